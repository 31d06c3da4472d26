"""Demonstrations in other formats become RLDS datasets: LeRobot v2.1 and v3.0 in their real layout, npz files."""

import json

import numpy as np
import pytest

from openvla_jax.data import DataError
from openvla_jax.data.__main__ import main
from openvla_jax.data.custom import catalogue
from openvla_jax.data.ingest import lerobot, npz
from openvla_jax.data.rlds import make_dataset

FPS, LENGTHS = 10, (4, 6, 5)
TASKS = ["pick up the cup", "open the drawer"]
GRAYS = [[40 + 60 * e + 8 * t for t in range(n)] for e, n in enumerate(LENGTHS)]  # tells which frame one sees


def _rows(episode):
    rng = np.random.default_rng(episode)
    start = sum(LENGTHS[:episode])
    return [
        {
            "action": rng.uniform(-1, 1, 7).astype(np.float32).tolist(),
            "observation.state": rng.uniform(-1, 1, 6).astype(np.float32).tolist(),
            "timestamp": t / FPS,
            "frame_index": t,
            "episode_index": episode,
            "index": start + t,
            # The task of the last episode changes on the way.
            "task_index": 0 if episode == 0 or (episode == 2 and t < 2) else 1,
        }
        for t in range(LENGTHS[episode])
    ]


def _video(path, grays):
    av = pytest.importorskip("av")
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libsvtav1", rate=FPS, options={"g": "2", "crf": "20", "preset": "12"})
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for gray in grays:
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), gray, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def _parquet(path, rows):
    import pyarrow

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def _info(folder, version, **paths):
    camera = {"dtype": "video", "shape": [64, 64, 3], "names": ["height", "width", "channels"]}
    info = {
        "codebase_version": version,
        "robot_type": "so100",
        "total_episodes": 3,
        "total_frames": sum(LENGTHS),
        "fps": FPS,
        "chunks_size": 1000,
        "splits": {"train": "0:3"},
        "features": {
            "action": {"dtype": "float32", "shape": [7]},
            "observation.state": {"dtype": "float32", "shape": [6]},
            "observation.images.top": camera,
        },
        **paths,
    }
    (folder / "meta").mkdir(parents=True, exist_ok=True)
    (folder / "meta" / "info.json").write_text(json.dumps(info))


def _write_v2(folder):
    _info(
        folder,
        "v2.1",
        data_path="data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        video_path="videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
    )
    lines = [{"episode_index": e, "tasks": TASKS, "length": n} for e, n in enumerate(LENGTHS)]
    (folder / "meta" / "episodes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    tasks = [{"task_index": i, "task": task} for i, task in enumerate(TASKS)]
    (folder / "meta" / "tasks.jsonl").write_text("".join(json.dumps(task) + "\n" for task in tasks))
    for e, grays in enumerate(GRAYS):
        _parquet(folder / f"data/chunk-000/episode_{e:06d}.parquet", _rows(e))
        _video(folder / f"videos/chunk-000/observation.images.top/episode_{e:06d}.mp4", grays)


def _write_v3(folder):
    """Episodes 0 and 1 share their files; episode 2 has its own."""
    _info(
        folder,
        "v3.0",
        data_path="data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        video_path="videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
    )
    key = "videos/observation.images.top"
    episodes = []
    for e, (file, start) in enumerate([(0, 0.0), (0, LENGTHS[0] / FPS), (1, 0.0)]):
        first = sum(LENGTHS[:e])
        episodes.append(
            {
                "episode_index": e,
                "tasks": TASKS,
                "length": LENGTHS[e],
                "data/chunk_index": 0,
                "data/file_index": file,
                "dataset_from_index": first,
                "dataset_to_index": first + LENGTHS[e],
                f"{key}/chunk_index": 0,
                f"{key}/file_index": file,
                f"{key}/from_timestamp": start,
                f"{key}/to_timestamp": start + LENGTHS[e] / FPS,
            }
        )
    _parquet(folder / "meta/episodes/chunk-000/file-000.parquet", episodes)
    tasks = [{"task_index": i, "__index_level_0__": task} for i, task in enumerate(TASKS)]
    _parquet(folder / "meta/tasks.parquet", tasks)
    _parquet(folder / "data/chunk-000/file-000.parquet", _rows(0) + _rows(1))
    _parquet(folder / "data/chunk-000/file-001.parquet", _rows(2))
    _video(folder / f"{key}/chunk-000/file-000.mp4", GRAYS[0] + GRAYS[1])
    _video(folder / f"{key}/chunk-000/file-001.mp4", GRAYS[2])


@pytest.fixture(params=[_write_v2, _write_v3], ids=["v2.1", "v3.0"])
def robot(request, tmp_path):
    pytest.importorskip("av")
    pytest.importorskip("pyarrow.parquet")
    request.param(tmp_path / "my-robot")
    return tmp_path / "my-robot"


def _read(folder, name, split="all"):
    """Episodes of a converted dataset as they were written."""
    import tensorflow as tf

    from openvla_jax.data import images

    config = catalogue(str(folder / f"{name}.py"))[0][name]
    bounds = {"mean": [0.0], "std": [1.0], "min": [-1.0], "max": [1.0], "q01": [-1.0], "q99": [1.0]}
    state = 0 if config.state_keys == (None,) else 6
    statistics = {
        part: {key: value * n for key, value in bounds.items()} for part, n in (("action", 7), ("proprio", state or 1))
    }
    statistics |= {"num_transitions": 15, "num_trajectories": 3}
    result = []
    for full in make_dataset(config, str(folder), split, statistics=statistics):
        frames = [images.decode(tf.constant(x)).numpy() for x in full["observation"]["image_primary"].numpy()]
        texts = [text.decode() for text in full["task"]["language_instruction"].numpy()]
        result.append((np.stack(frames), full["action"].numpy(), full["observation"]["proprio"].numpy(), texts))
    return result


def test_lerobot_datasets_are_converted_row_by_row(robot, tmp_path):
    told = lerobot.convert(robot, tmp_path / "out")
    assert told.startswith("3 episodes; look over ") and "my_robot.py" in told
    episodes = _read(tmp_path / "out", "my_robot")
    assert len(episodes) == 3
    for number, (frames, action, state, texts) in enumerate(episodes):
        rows = _rows(number)
        np.testing.assert_allclose(action, [row["action"] for row in rows], atol=1e-6)
        np.testing.assert_allclose(state, [row["observation.state"] for row in rows], atol=1e-6)
        assert texts == [TASKS[row["task_index"]] for row in rows]
        assert frames.shape == (LENGTHS[number], 64, 64, 3)
        # Neighbouring frames differ by 8 levels, video and JPEG by 3 at most: each row has its own.
        np.testing.assert_allclose(frames.mean(axis=(1, 2, 3)), GRAYS[number], atol=3.5)


def test_part_of_the_episodes_can_be_held_out(robot, tmp_path):
    assert main(["from-lerobot", str(robot), str(tmp_path / "out"), "--name", "held", "--val_share", "0.3"]) == 0
    lengths = {split: [len(e[1]) for e in _read(tmp_path / "out", "held", split)] for split in ("train", "val")}
    assert lengths == {"train": [6, 5], "val": [4]}


def _change_info(folder, **changes):
    path = folder / "meta" / "info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "meta/info.json").unlink(), r"info.json: there is no such file; give the folder"),
        (lambda f: _change_info(f, codebase_version="v1.6"), r"format 'v1.6' is not read here, only v2 and v3"),
        (lambda f: next(f.rglob("*.mp4")).write_bytes(b"no video"), r"\.mp4: .*Invalid data found.*; download"),
        (lambda f: _video(sorted(f.rglob("*.mp4"))[0], [0, 0]),
         r"frame_index 2, camera top: no frame of .*\.mp4 is within 0.0001.. s of 0.2000 s"),
        (lambda f: sorted(f.glob("data/*/*"))[-1].unlink(), r"\.parquet: there is no such file; download it again"),
        (lambda f: next(f.glob("meta/tasks.*")).unlink(), r"frame_index 0: has no task.* 2 tasks; give --instr"),
        (lambda f: _change_info(f, features={"action": {"dtype": "float32"}}), r"has no camera among its features"),
    ],
)  # fmt: skip
def test_damaged_lerobot_datasets_are_told_and_leave_nothing(robot, tmp_path, spoil, message):
    spoil(robot)
    with pytest.raises(DataError, match=message) as caught:
        lerobot.convert(robot, tmp_path / "out", "mine")
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "out").rglob("*.json")) and not list((tmp_path / "out").rglob("*.py"))


def test_nothing_is_overwritten(tmp_path, capsys):
    folder = _npz(tmp_path)
    assert main(["from-npz", str(folder), str(tmp_path / "out"), "--name", "mine"]) == 0
    with pytest.raises(SystemExit, match="2"):
        main(["from-npz", str(folder), str(tmp_path / "out"), "--name", "mine"])
    assert "mine.py exists already: remove it, or choose another --name" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# npz
# ---------------------------------------------------------------------------------------------------------------------


def _npz(tmp_path, **changes):
    folder = tmp_path / "episodes"
    folder.mkdir(exist_ok=True)
    for number, length in enumerate(LENGTHS):
        arrays = {
            "image": np.repeat(np.array(GRAYS[number], np.uint8), 32 * 32 * 3).reshape(length, 32, 32, 3),
            "action": np.array([row["action"] for row in _rows(number)]),
            "language_instruction": np.array(TASKS[0]),
        }
        if number == 1:
            arrays |= changes
        np.savez(folder / f"episode_{number}.npz", **{k: v for k, v in arrays.items() if v is not None})
    return folder


def test_npz_episodes_are_converted(tmp_path):
    npz.convert(_npz(tmp_path), tmp_path / "out", "mine")
    episodes = _read(tmp_path / "out", "mine")
    assert [len(action) for _, action, _, _ in episodes] == list(LENGTHS)
    for number, (frames, action, _, texts) in enumerate(episodes):
        np.testing.assert_allclose(action, [row["action"] for row in _rows(number)], atol=1e-6)
        np.testing.assert_allclose(frames.mean(axis=(1, 2, 3)), GRAYS[number], atol=1.5)
        assert set(texts) == {TASKS[0]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"action": np.full((6, 7), np.nan)}, r"episode 1: action is NaN or infinite at step 0"),
        ({"action": np.zeros((5, 7))}, r"episode 1 has 5 actions and 6 frames of camera 'primary'"),
        ({"action": np.zeros((6, 5))}, r"episode 1 has actions and states of widths 5 and 0, the first 7 and 0"),
        ({"action": None}, r"episode_1.npz holds image, language_instruction: 'action' and 'image'"),
        ({"image": np.zeros((6, 32, 32, 3))}, r"camera 'primary': a frame is float64 \[32, 32, 3\], not uint8"),
        ({"image": np.zeros((6, 32, 32), np.uint8)}, r"image has shape \[6, 32, 32\], not \[steps, height, width, 3\]"),
        ({"language_instruction": None}, r"episode_1.npz has no language_instruction: give one with --instruction"),
        (
            {"action": np.array([{"a": 1}] * 6, object)},
            r"episode_1.npz: action.npy holds Python objects, which are not read; store plain arrays",
        ),
    ],
)
def test_npz_episodes_that_do_not_fit_are_told(tmp_path, changes, message):
    with pytest.raises(DataError, match=message) as caught:
        npz.convert(_npz(tmp_path, **changes), tmp_path / "out", "mine")
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "out").rglob("*.json"))
    with pytest.raises(DataError, match=r"has no .npz files"):
        npz.convert(tmp_path, tmp_path / "out")
