"""What a training logs can be read back, also after a crash."""

import json

from tensorboardX.proto.event_pb2 import Event

from seq2seq.metrics import Metrics, curves


def test_what_is_logged_is_read_back_by_name(tmp_path):
    with Metrics(tmp_path) as metrics:
        metrics.log(step=1, loss=2.5, accuracy=0.25)
        metrics.log(step=2, loss=float("nan"))
        metrics.log(step=3, loss=1.5)
    assert curves(tmp_path) == {"loss": ([1, 3], [2.5, 1.5]), "accuracy": ([1], [0.25])}
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[1] == {"step": 2, "loss": None}


def test_steps_made_again_after_a_crash_count_once_and_a_torn_line_not_at_all(tmp_path):
    with Metrics(tmp_path) as metrics:
        metrics.log(step=1, loss=3.0)
        metrics.log(step=2, loss=2.0)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    with Metrics(tmp_path) as metrics:
        metrics.log(step=2, loss=2.25)
        metrics.log(step=3, loss=1.0)
    assert curves(tmp_path) == {"loss": ([1, 2, 3], [3.0, 2.25, 1.0])}


def test_tensorboard_gets_the_same_numbers(tmp_path):
    with Metrics(tmp_path) as metrics:
        metrics.log(step=7, loss=2.5)
    (path,) = (tmp_path / "tensorboard").iterdir()
    data, found = path.read_bytes(), []
    while data:  # TFRecord: length, its checksum, the event, its checksum
        length = int.from_bytes(data[:8], "little")
        event = Event.FromString(data[12 : 12 + length])
        found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
        data = data[16 + length :]
    assert found == [(7, "loss", 2.5)]


def test_a_run_that_has_logged_nothing_has_no_curves(tmp_path):
    assert curves(tmp_path) == {}
