"""LeRobot datasets made by LeRobot itself (make_lerobot.py), row by row as LeRobot's own reader returns them."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from openvla_jax.data import DataError
from openvla_jax.data.__main__ import main
from openvla_jax.data.custom import catalogue
from openvla_jax.data.ingest import lerobot
from openvla_jax.data.ingest.demonstrations import primary_view

FRONT, WRIST, DEPTH = (f"observation.images.{view}" for view in ("front", "wrist", "depth"))


@pytest.fixture(params=["lerobot_v2.1", "lerobot_v3.0"])
def dataset(request, tmp_path):
    """A copy to be spoiled."""
    return shutil.copytree(Path(__file__).parent / request.param, tmp_path / request.param)


@pytest.fixture
def v2(tmp_path):
    return shutil.copytree(Path(__file__).parent / "lerobot_v2.1", tmp_path / "lerobot_v2.1")


@pytest.fixture
def v3(tmp_path):
    return shutil.copytree(Path(__file__).parent / "lerobot_v3.0", tmp_path / "lerobot_v3.0")


@pytest.fixture
def converted(monkeypatch, tmp_path):
    """convert(dataset, ...) -> the episodes that would be written, with their frames."""

    def convert(source, **options):
        kept = []

        def keep(folder, name, episodes, count, val_share, source, primary):
            kept.extend(
                [
                    {
                        **{view: np.stack(list(frames)) for view, frames in {**e.cameras, **e.depth}.items()},
                        "action": e.action,
                        "state": e.state,
                        "task": e.instructions,
                    }
                    for e in episodes
                ]
            )
            return folder, folder / "x.py"

        monkeypatch.setattr(lerobot, "write", keep)
        lerobot.convert(source, tmp_path / "out", "x", **options)
        return kept

    return convert


def _rows(dataset, keep=lambda frame, last: True):
    """What LeRobot returned for the rows of each episode that are kept."""
    expected = dict(np.load(dataset / "expected.npz"))
    if "depth" in expected:
        expected["depth"] = expected["depth"][..., 0]
    for episode in np.unique(expected["episode"]):
        frames = np.where(expected["episode"] == episode, expected["frame"], -1)
        rows = [i for i, frame in enumerate(frames) if frame >= 0 and keep(frame, frames.max())]
        yield {key: values[rows] for key, values in expected.items()}


def _assert_same(episodes, dataset, keep=lambda frame, last: True):
    wanted = list(_rows(dataset, keep))
    assert len(episodes) == len(wanted) == 3
    for got, rows in zip(episodes, wanted, strict=True):
        for key in got.keys() & rows.keys():
            np.testing.assert_array_equal(got[key], rows[key], err_msg=key)


def _files(dataset):
    return sorted((dataset / "data").rglob("*.parquet"))


def _change_rows(dataset, change, files=slice(None)):
    for path in _files(dataset)[files]:
        pq.write_table(change(pq.read_table(path).replace_schema_metadata(None)), path)


def _set(table, key, values):
    column = values if isinstance(values, pa.Array) else pa.array(values)
    return table.set_column(table.column_names.index(key), key, column)


def _change_info(dataset, **changes):
    path = dataset / "meta" / "info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _change_feature(dataset, key, **changes):
    features = json.loads((dataset / "meta" / "info.json").read_text())["features"]
    _change_info(dataset, features=features | {key: {**features.get(key, {}), **changes}})


def _change_episodes(dataset, change):
    """Changes the records of the episodes, whatever the format."""
    path = dataset / "meta" / "episodes.jsonl"
    if path.exists():
        records = change([json.loads(line) for line in path.read_text().splitlines()])
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    for path in (dataset / "meta").glob("episodes/*/*.parquet"):
        columns = [name for name in pq.read_schema(path).names if not name.startswith("stats/")]
        pq.write_table(pa.Table.from_pylist(change(pq.read_table(path, columns=columns).to_pylist())), path)


def _keep_rows(dataset, keep):
    """Drops rows of the data, as table tools do; the videos and what identifies the other rows stay."""
    lengths = {}

    def change(table):
        episode, frame = table["episode_index"].to_numpy(), table["frame_index"].to_numpy()
        kept = [keep(f, frame[episode == e].max()) for e, f in zip(episode, frame, strict=True)]
        for number in episode[kept].tolist():
            lengths[number] = lengths.get(number, 0) + 1
        return table.filter(pa.array(kept))

    _change_rows(dataset, change)
    _change_episodes(dataset, lambda records: [{**r, "length": lengths[r["episode_index"]]} for r in records])


# ---------------------------------------------------------------------------------------------------------------------
# Rows and frames
# ---------------------------------------------------------------------------------------------------------------------


def test_conversion_equals_lerobots_own_reader(dataset, converted):
    _assert_same(converted(dataset), dataset)


def test_conversion_follows_frame_index_in_shuffled_rows(dataset, converted):
    _change_rows(dataset, lambda t: t.take(np.random.default_rng(0).permutation(t.num_rows)))
    _change_episodes(dataset, lambda records: records[::-1])
    _assert_same(converted(dataset), dataset)


def test_conversion_follows_timestamps_in_trimmed_episodes(dataset, converted):
    def trimmed(frame, last):
        return 1 < frame < last

    _keep_rows(dataset, trimmed)
    _assert_same(converted(dataset), dataset, trimmed)


@pytest.mark.parametrize("renumbered", [False, True])
def test_conversion_follows_timestamps_in_down_sampled_episodes(dataset, converted, renumbered):
    def even(frame, last):
        return frame % 2 == 0

    _keep_rows(dataset, even)
    _change_info(dataset, fps=5)
    if renumbered:
        _change_rows(dataset, lambda t: _set(t, "frame_index", t["frame_index"].to_numpy() // 2))
    _assert_same(converted(dataset), dataset, even)


def _later(table, seconds):
    return _set(table, "timestamp", pa.array([x + seconds for x in table["timestamp"].to_pylist()], pa.float32()))


def _moved(key, row, value):
    return lambda t: _set(t, key, [value if i == row else x for i, x in enumerate(t[key].to_pylist())])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: _keep_rows(d, lambda frame, last: frame not in (2, 3)),
         r"episode 0, frame_index 4: comes 3 frames and 0.3000 s after"),
        (lambda d: _change_rows(d, _moved("frame_index", 3, 2)), r"frame_index 2: comes 0 frames and 0.1000 s"),
        (lambda d: _change_rows(d, _moved("timestamp", 3, 0.2)), r"frame_index 3: comes 1 frames and -0.0000"),
        (lambda d: _change_rows(d, _moved("timestamp", 3, float("nan"))), r"'timestamp' is not one finite number"),
        (lambda d: _change_rows(d, _moved("timestamp", 0, None)), r"column 'timestamp' has empty cells"),
        (lambda d: _change_rows(d, _moved("frame_index", 0, -1)), r"frame_index -1: frame_index -1.0, timestamp 0.0"),
        (lambda d: _change_info(d, fps=30), r"frame_index 1: comes 1 frames and 0.1000 s .* at 30 fps.*correct fps"),
        (lambda d: _change_rows(d, lambda t: _later(t, 0.03)),
         r"frame_index 0, camera front: no frame of .* within 0.0001.. s of 0.0300 s; the nearest is at 0.0000 s"),
        (lambda d: _change_rows(d, lambda t: pa.concat_tables([t, t])), r"episode 0: has 10 rows, meta says 5"),
        (lambda d: _change_rows(d, lambda t: t.slice(t.num_rows)), r"episode 0: has 0 rows, meta says 5"),
        (lambda d: _change_rows(d, lambda t: t.drop_columns(["timestamp"])), r"has no column 'timestamp'; it has "),
        (lambda d: _change_rows(d, lambda t: t.drop_columns(["action"])), r"has no column 'action'; it has "),
        (lambda d: _change_rows(d, lambda t: _set(t, "episode_index", ["0"] * t.num_rows)), r"parquet: .*kernel"),
        (lambda d: _change_rows(d, lambda t: _set(t, "action", [["1"] * 6] * t.num_rows)), r"'action' is no table of"),
        (lambda d: _change_rows(d, lambda t: _set(t, "action", [[1.0] * (6 + i % 2) for i in range(t.num_rows)])),
         r"'action' has empty cells or cells of several lengths"),
        (lambda d: _change_rows(d, lambda t: _set(t, "observation.state", [[[1.0, 2.0]] * 3] * t.num_rows)),
         r"'observation.state' is no table of numbers"),
        (lambda d: next(d.rglob("*.mp4")).unlink(), r"\.mp4: cannot be read: No such file"),
    ],
)  # fmt: skip
def test_conversion_refuses_rows_that_do_not_fit(v3, converted, spoil, message):
    spoil(v3)
    with pytest.raises(DataError, match=message) as caught:
        converted(v3)
    assert "\n" not in str(caught.value)


def test_conversion_does_not_show_the_next_episode(v3, converted):
    """Rows beyond the end of an episode, which the video they share with the next one would serve."""
    _change_rows(v3, lambda t: _later(t, 0.1))
    with pytest.raises(
        DataError, match=r"episode 0, frame_index 4, camera front: no frame .* the nearest is at 0.4000"
    ):
        converted(v3)


def test_conversion_allows_what_tolerance_says(dataset, converted):
    _change_rows(dataset, lambda t: _later(t, 0.004))
    with pytest.raises(DataError, match=r"of 0.0040 s; the nearest is at 0.0000 s; leave .* with --tolerance"):
        converted(dataset)
    _assert_same(converted(dataset, tolerance=0.01), dataset)
    with pytest.raises(DataError, match=r"is within nan s"):
        converted(dataset, tolerance=float("nan"))


# ---------------------------------------------------------------------------------------------------------------------
# Cameras, depth, columns
# ---------------------------------------------------------------------------------------------------------------------


def test_depth_is_written_in_16_bits_and_is_no_camera(v3, tmp_path):
    assert main(["from-lerobot", str(v3), str(tmp_path), "--name", "mine"]) == 0
    config = catalogue(str(tmp_path / "mine.py"))[0]["mine"]
    assert config.image_keys.keys() == {"primary", "wrist"} and config.depth_keys.keys() == {"depth"}
    assert '"primary": "front"' in (tmp_path / "mine.py").read_text()
    builder = tfds.builder_from_directory(str(tmp_path / "mine" / "1.0.0"))
    for episode, rows in zip(builder.as_dataset(split="train"), _rows(v3), strict=True):
        steps = list(episode["steps"].as_numpy_iterator())
        depth = np.stack([step["observation"]["depth"] for step in steps])
        assert depth.dtype == np.uint16 and rows["depth"].max() > 50_000
        np.testing.assert_array_equal(depth[..., 0], rows["depth"])
        front = np.stack([step["observation"]["front"] for step in steps]).astype(float)
        assert np.abs(front - rows["front"]).mean(axis=(1, 2, 3)).max() < 2


def _pictures(dataset, key, image, suffix="PNG"):
    stream = io.BytesIO()
    image.save(stream, suffix)
    cell = {"bytes": stream.getvalue(), "path": None}
    _change_rows(dataset, lambda t: _set(t, key, pa.array([cell] * t.num_rows)))


GRAY16 = Image.fromarray(np.full((64, 128), 40_000, np.uint16))


@pytest.mark.parametrize(
    ("key", "image", "suffix", "message"),
    [
        (WRIST, GRAY16, "PNG", r"frame_index 0, camera wrist: the image has one channel \(mode I;16\)"),
        (WRIST, Image.new("L", (128, 64), 7), "PNG", r"the image has one channel \(mode L\)"),
        (WRIST, Image.new("1", (128, 64)), "PNG", r"the image has one channel \(mode 1\)"),
        (WRIST, Image.new("LA", (128, 64)), "PNG", r"the image has one channel \(mode LA\)"),
        (WRIST, Image.new("I", (128, 64), 70_000), "TIFF", r"the image has one channel \(mode I\)"),
        (WRIST, Image.new("F", (128, 64), 0.5), "TIFF", r"the image has one channel \(mode F\)"),
        (DEPTH, Image.new("F", (128, 64), 0.5), "TIFF", r"camera depth: the image \(mode F\) is no depth in whole"),
        (DEPTH, Image.new("I", (128, 64), 70_000), "TIFF", r"depths from 70000 to 70000 do not fit 16 bits"),
        (DEPTH, Image.new("RGB", (128, 64)), "PNG", r"the image \(mode RGB\) is no depth .*--leave_out"),
    ],
)
def test_conversion_refuses_images_that_would_lose_depth(v3, converted, key, image, suffix, message):
    _pictures(v3, key, image, suffix)
    with pytest.raises(DataError, match=message):
        converted(v3)
    assert len(converted(v3, leave_out=[key.rpartition(".")[2]])) == 3


@pytest.mark.parametrize(
    ("image", "suffix", "value"),
    [
        (GRAY16, "PNG", 40_000),
        (GRAY16, "TIFF", 40_000),
        (Image.new("I", (128, 64), 65_535), "TIFF", 65_535),
        (Image.new("L", (128, 64), 7), "PNG", 7),
        (Image.new("1", (128, 64), 1), "PNG", 1),
    ],
)
def test_depth_keeps_stored_values(v3, converted, image, suffix, value):
    _pictures(v3, DEPTH, image, suffix)
    for episode in converted(v3):
        assert episode["depth"].dtype == np.uint16 and (episode["depth"] == value).all()


@pytest.mark.parametrize(
    "marks",
    [
        {"info": {"is_depth_map": True}},
        {"info": {"video.is_depth_map": True}},
        {"video_info": {"video.is_depth_map": True}},
        {"shape": [64, 128, 1]},
        {"shape": [1, 64, 128], "names": ["channels", "height", "width"]},
        {"shape": [64, 128]},
    ],
)
def test_depth_video_is_refused_by_name(v2, converted, marks):
    _change_feature(v2, FRONT, **{"info": {}, **marks})
    with pytest.raises(DataError, match=rf"{FRONT} is a video of depth or of one channel.*--leave_out {FRONT}"):
        converted(v2)


def test_gray_video_is_refused(v2, converted):
    import av

    for path in v2.rglob("*.mp4"):
        with av.open(str(path), "w") as container:
            stream = container.add_stream("ffv1", rate=10)
            stream.width, stream.height, stream.pix_fmt = 64, 64, "gray"
            for _ in range(20):
                container.mux(stream.encode(av.VideoFrame(64, 64, "gray")))
            container.mux(stream.encode())
    with pytest.raises(DataError, match=r"camera front: .*\.mp4 has one channel \(gray\), as depth has"):
        converted(v2)


@pytest.mark.parametrize(
    ("views", "asked", "primary"),
    [
        (["left_wrist", "top"], None, "top"),
        (["cam_high", "cam_left_wrist", "cam_right_wrist"], None, "cam_high"),
        (["wrist"], None, "wrist"),
        (["front", "primary"], None, "primary"),
        (["front", "side"], "side", "side"),
        (["front", "wrist"], "wrist", "wrist"),
        (["front", "side"], None, r"x: has cameras front, side; name the one that policies see with --primary"),
        (["left_wrist", "right_wrist"], None, r"with --primary"),
        (["front", "side"], "top", r"has no camera 'top'; --primary may be front, side"),
        (["front", "primary"], "front", r"a camera is called 'primary' already"),
    ],
)
def test_primary_view_is_obvious_or_asked_for(views, asked, primary):
    if primary in views:
        assert primary_view(views, asked, "x") == primary
    else:
        with pytest.raises(DataError, match=primary):
            primary_view(views, asked, "x")


@pytest.mark.parametrize("primary", ["wrist", WRIST])
def test_primary_flag_takes_view_or_feature(v2, tmp_path, primary):
    lerobot.convert(v2, tmp_path, "mine", primary=primary)
    assert 'cameras={"primary": "wrist", "front": "front"}' in (tmp_path / "mine.py").read_text()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("observation.images_wrist", r"would both be called 'images_wrist'"),
        ("observation.images.state", r"observation.images.state and the state would both be called 'state'"),
    ],
)
def test_cameras_of_one_name_are_refused(v3, converted, name, message):
    feature = {"dtype": "image", "shape": [64, 128, 3]}
    for key in (name, "observation.images.images.wrist"):
        _change_feature(v3, key, **feature)
    with pytest.raises(DataError, match=message):
        converted(v3)


def test_named_columns_are_joined_in_order(dataset, converted):
    names = {"action": "actions", "observation.state": "state"}
    _change_rows(dataset, lambda t: t.rename_columns([names.get(name, name) for name in t.column_names]))
    features = json.loads((dataset / "meta" / "info.json").read_text())["features"]
    _change_info(dataset, features={names.get(key, key): value for key, value in features.items()})
    with pytest.raises(DataError, match=r"has no feature 'action', only .*actions.*; name one with --action"):
        converted(dataset)
    with pytest.raises(DataError, match=r"has no feature 'stat'; --state may be .*state"):
        converted(dataset, action=["actions"], state=["stat"])
    for got, rows in zip(
        converted(dataset, action=["actions"], state=["state", "actions"]), _rows(dataset), strict=True
    ):
        np.testing.assert_array_equal(got["action"], rows["action"])
        np.testing.assert_array_equal(got["state"], np.concatenate([rows["state"], rows["action"]], axis=1))


def test_state_is_joined_from_observation_states(dataset, converted):
    state = "observation.state"

    def split(table):
        values = np.stack(table[state].to_numpy())
        parts = {"observation.states.b": values[:, :2].tolist(), "observation.states.a": values[:, 2].tolist()}
        table = table.drop_columns([state])
        for key, part in parts.items():
            table = table.append_column(key, pa.array(part))
        return table

    _change_rows(dataset, split)
    features = json.loads((dataset / "meta" / "info.json").read_text())["features"]
    features.pop(state)
    for key in ("observation.states.b", "observation.states.a"):
        features[key] = {"dtype": "float32", "shape": [1]}
    _change_info(dataset, features=features)
    for got, rows in zip(converted(dataset), _rows(dataset), strict=True):
        np.testing.assert_array_equal(got["state"], rows["state"][:, :3])


# ---------------------------------------------------------------------------------------------------------------------
# Tasks and other metadata
# ---------------------------------------------------------------------------------------------------------------------


def test_tasks_come_from_the_episodes_table(dataset, converted):
    next((dataset / "meta").glob("tasks.*")).unlink()
    with pytest.raises(DataError, match=r"frame_index 0: has no task; the episode has \d tasks; give --instruction"):
        converted(dataset)
    _change_episodes(dataset, lambda records: [{**r, "tasks": [f"only {r['episode_index']}"]} for r in records])
    _change_rows(dataset, lambda t: t.drop_columns(["task_index"]))
    assert [set(episode["task"]) for episode in converted(dataset)] == [{"only 0"}, {"only 1"}, {"only 2"}]


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.append_column("category", pa.array(["pick"] * t.num_rows)),
        lambda t: t.append_column("task", pa.array(["other"] * t.num_rows)),  # the index of the pandas table counts
        lambda t: t.take([2, 0, 1]),
        lambda t: t.replace_schema_metadata(None).rename_columns(
            ["task_index" if name == "task_index" else "__index_level_0__" for name in t.column_names]
        ),
        lambda t: t.replace_schema_metadata(None).rename_columns(
            ["task_index" if name == "task_index" else "anything" for name in t.column_names]
        ),
    ],
    ids=["extra", "index-and-task", "order", "index0", "other-name"],
)  # fmt: skip
def test_tasks_of_a_changed_table_are_found(v3, converted, change):
    path = v3 / "meta" / "tasks.parquet"
    table = pq.read_table(path)
    if "task" in table.column_names:  # LeRobot's own name of the index
        index = table.rename_columns(["text" if name == "task" else name for name in table.column_names])
        metadata = json.loads(table.schema.metadata[b"pandas"]) | {"index_columns": ["text"]}
        table = index.replace_schema_metadata({"pandas": json.dumps(metadata)})
    pq.write_table(change(table), path)
    _assert_same(converted(v3), v3)


def test_tasks_may_hold_a_line_separator(v2, converted):
    path = v2 / "meta" / "tasks.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    text = "".join(json.dumps({**r, "task": f"{r['task']}\u2028\x85"}, ensure_ascii=False) + "\r\n" for r in lines)
    path.write_text(text, encoding="utf-8-sig", newline="")
    for got, rows in zip(converted(v2), _rows(v2), strict=True):
        assert got["task"] == [f"{task}\u2028\x85" for task in rows["task"]]


def _line(path, record):
    path.write_text(json.dumps(record) + "\n" + path.read_text())


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: (d / "meta/info.json").write_text("[]"), r"info.json: holds a list, not an object; give the folder"),
        (lambda d: (d / "meta/info.json").write_text("["), r"info.json: .*JSONDecodeError.*; give the folder"),
        (lambda d: (d / "meta/info.json").write_text("[" * 100_000), r"info.json: .*recursion"),
        (lambda d: _change_info(d, features=[]), r"info.json: 'features' is '\[\]', of type list"),
        (lambda d: _change_info(d, features={"action": 1}), r"info.json, feature 'action': is a int, not an object"),
        (lambda d: _change_info(d, features={"action": {}}), r"info.json, feature 'action': has no 'dtype'"),
        (lambda d: _change_info(d, fps=None), r"info.json: 'fps' is 'None', of type NoneType"),
        (lambda d: _change_info(d, fps=0), r"info.json: fps is 0"),
        (lambda d: _change_info(d, total_episodes=4), r"meta: lists 3 episodes, info.json has total_episodes 4"),
        (lambda d: _change_info(d, data_path=7), r"info.json: 'data_path' is '7', of type int"),
        (lambda d: _change_info(d, data_path="data/{chunk:03d}.parquet"), r"data_path .* asks for 'chunk'; known are"),
        (lambda d: _change_info(d, video_path="{video_key.__class__}"), r"video_path .* is no path template"),
        (lambda d: _change_info(d, video_path="{video_key:999999999}"), r"video_path .* is no path template"),
        (lambda d: _change_info(d, data_path="../{episode_index}"), r"data_path .* (is no path template|asks for)"),
        (lambda d: _change_info(d, data_path="/etc/passwd"), r"data_path '/etc/passwd' is no path template"),
        (lambda d: _change_episodes(d, lambda r: [{k: v for k, v in x.items() if k != "length"} for x in r]),
         r"(episodes.jsonl, line 1|file-000.parquet, row 0): has no 'length'"),
        (lambda d: _change_episodes(d, lambda r: [{**x, "length": -1} for x in r]), r": 'length' is -1, not a whole"),
        (lambda d: _change_episodes(d, lambda r: [{**x, "tasks": [1]} for x in r]), r": tasks are \[1\], not a list"),
        (lambda d: _change_episodes(d, lambda r: [*r, r[0]]), r": episode 0 is listed twice"),
        (lambda d: _change_episodes(d, lambda r: r[:2]), r"meta: lists 2 episodes, info.json has total_episodes 3"),
        (lambda d: _change_episodes(d, lambda r: [*r[:2], {**r[2], "episode_index": 7}]), r"(no such file|has 0 rows)"),
    ],
)  # fmt: skip
def test_metadata_that_is_missing_or_odd_is_one_line(dataset, converted, spoil, message):
    spoil(dataset)
    with pytest.raises(DataError, match=message) as caught:
        converted(dataset)
    assert "\n" not in str(caught.value) and str(dataset) in str(caught.value)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: _line(d / "meta/episodes.jsonl", [1]), r"episodes.jsonl, line 1: holds a list, not an object"),
        (lambda d: (d / "meta/episodes.jsonl").unlink(), r"episodes.jsonl: cannot be read: No such file"),
        (lambda d: (d / "meta/episodes.jsonl").write_text("\n"), r"meta: lists no episodes"),
        (lambda d: (d / "meta/tasks.jsonl").write_bytes(b'{"task_index": 0, "task": "caf\xe9"}'), r"line 1: .*utf-8"),
        (lambda d: _line(d / "meta/tasks.jsonl", {"task_index": 0, "task": ["a", "b"]}), r"line 1: 'task' is .* list"),
        (lambda d: _line(d / "meta/tasks.jsonl", {"task_index": 0, "task": "x"}), r"line 2: task 0 is both 'x' and"),
        (lambda d: _line(d / "meta/tasks.jsonl", {"task_index": True, "task": "x"}), r"line 1: 'task_index' is 'True'"),
        (lambda d: _change_info(d, chunks_size=0), r"info.json: chunks_size is 0"),
    ],
)  # fmt: skip
def test_json_lines_that_are_odd_are_named(v2, converted, spoil, message):
    spoil(v2)
    with pytest.raises(DataError, match=message):
        converted(v2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: {k: v for k, v in r.items() if not k.startswith("data/")}, r"row 0: has no 'data/chunk_index'"),
        (lambda r: {k: v for k, v in r.items() if "to_timestamp" not in k}, r"has no 'videos/.*front/to_timestamp'"),
        (lambda r: {**r, f"videos/{FRONT}/from_timestamp": float("nan")}, r"from_timestamp' is nan, not a time"),
        (lambda r: {**r, f"videos/{FRONT}/to_timestamp": 0.0}, r"front runs from 0.0 s to 0.0 s"),
        (lambda r: {**r, f"videos/{FRONT}/file_index": None}, r"file_index' is 'None', of type NoneType"),
    ],
)
def test_episodes_table_that_is_odd_is_named(v3, converted, change, message):
    _change_episodes(v3, lambda records: [change(record) for record in records])
    with pytest.raises(DataError, match=rf"file-000.parquet, row 0: .*{message.removeprefix('row 0: ')}"):
        converted(v3)


def test_half_downloaded_files_are_named(v3, converted):
    for path in [*_files(v3), *v3.rglob("*.mp4"), *(v3 / "meta").rglob("*.parquet")]:
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(DataError, match=rf"{path}.*; download it again") as caught:
            converted(v3)
        assert "\n" not in str(caught.value)
        path.write_bytes(whole)
