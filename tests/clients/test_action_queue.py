"""Which action comes next, from chunks of a policy whose actions tell where they come from."""

import numpy as np
import pytest
from openvla_client import ActionQueue, ClientError


class Planner:
    """Answers to an observation, the number of a step, with chunks drawn anew for every call."""

    def __init__(self, horizon: int = 5, dim: int = 3):
        self.horizon, self.dim, self.seen, self.chunks = horizon, dim, [], []
        self.rng = np.random.default_rng(0)

    def predict_chunk(self, observation):
        if observation == "broken":
            raise RuntimeError("the server is gone")
        self.seen.append(observation)
        self.chunks.append(self.rng.normal(size=(self.horizon, self.dim)))
        return self.chunks[-1]


@pytest.mark.parametrize(("execute", "each"), [(1, 1), (3, 3), (5, 5), (None, 5)])
def test_queue_executes_the_first_actions_of_each_chunk(execute, each):
    planner = Planner()
    queue = ActionQueue(planner, execute)
    actions = [queue.next(step) for step in range(2 * each + 1)]
    assert planner.seen == [0, each, 2 * each], "it looks only when it plans"
    first, second, third = planner.chunks
    np.testing.assert_array_equal(actions, [*first[:each], *second[:each], third[0]])


def test_queue_needs_an_observation_only_if_it_is_empty():
    queue = ActionQueue(Planner(), 2)
    assert queue.empty
    with pytest.raises(ClientError, match="the queue is empty: give an observation"):
        queue.next()
    queue.next(0)
    assert not queue.empty
    queue.next()
    assert queue.empty
    queue.next(2)
    queue.reset()
    assert queue.empty, "an episode begins with a plan"


def averaged(chunks, steps, execute, m):
    """ACT's algorithm 2: a table of what was planned when for when, and its columns' weighted means."""
    horizon, dim = chunks[0].shape
    table = np.full((steps, steps + horizon, dim), np.nan)
    actions = []
    for step in range(steps):
        if step % execute == 0:
            table[step, step : step + horizon] = chunks[step // execute]
        planned = table[:, step][~np.isnan(table[:, step, 0])]
        weights = np.exp(-m * np.arange(len(planned)))
        actions.append((planned * (weights / weights.sum())[:, None]).sum(axis=0))
    return actions


@pytest.mark.parametrize("execute", [1, 2, 3])
@pytest.mark.parametrize("m", [0.0, 0.01, 0.5, -0.3])
def test_queue_averages_what_all_chunks_planned_for_a_moment(execute, m):
    planner = Planner()
    queue = ActionQueue(planner, execute, ensemble=m)
    actions = [queue.next(step) for step in range(14)]
    np.testing.assert_allclose(actions, averaged(planner.chunks, 14, execute, m), rtol=0, atol=1e-12)
    assert len(queue._chunks) <= 5, "what is over is forgotten"
    latest = ActionQueue(Planner(), execute)
    assert not np.allclose(actions, [latest.next(step) for step in range(14)])


@pytest.mark.parametrize("ensemble", [None, 0.01])
def test_queue_is_as_before_when_the_policy_fails(ensemble):
    planner, other = Planner(), Planner()
    queue, smooth = ActionQueue(planner, 2, ensemble), ActionQueue(other, 2, ensemble)
    for step in range(6):
        if queue.empty:
            with pytest.raises(RuntimeError, match="gone"):
                queue.next("broken")
        np.testing.assert_array_equal(queue.next(step), smooth.next(step))


def test_queue_keeps_no_view_of_the_policy_s_chunk():
    planner = Planner()
    queue = ActionQueue(planner)
    action = queue.next(0)
    action[:] = 0
    assert (planner.chunks[0] != 0).all() and (queue.next() != 0).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"execute": 0}, "execute 0: give a whole number of at least 1"),
        ({"execute": True}, "execute True"),
        ({"execute": 2.0}, "execute 2.0"),
        ({"ensemble": float("nan")}, "ensemble nan: give a finite number"),
        ({"ensemble": float("inf")}, "ensemble inf"),
    ],
)
def test_queue_refuses_a_wrong_setting(settings, message):
    with pytest.raises(ClientError, match=message):
        ActionQueue(Planner(), **settings)


def test_queue_refuses_chunks_that_do_not_fit():
    with pytest.raises(ClientError, match=r"execute 6: the policy's chunk has shape \(5, 3\)"):
        ActionQueue(Planner(), 6).next(0)
    queue = ActionQueue(Planner(), 1, ensemble=0.01)
    queue.next(0)
    queue.policy = Planner(dim=4)
    with pytest.raises(ClientError, match=r"reset\(\) between episodes"):
        queue.next(1)
