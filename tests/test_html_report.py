# ruff: noqa: E501 - lines of logs are long
"""Reports: what is read from the logs of fairseq's versions of a progress bar, and the page."""

import io
import json
import os
import re
import shutil
import time

import pytest
import torch
from conftest import TINY_MODEL, TINY_TRAINING, USER_DIR
from small_models import build_model, checkpoint_of
from test_checkpoint import gadgets

from fairseq_autosize.checkpoint import read_checkpoint, write_checkpoint
from fairseq_autosize.cli import main
from fairseq_autosize.compaction import compact
from fairseq_autosize.groups import feed_forward_in_state
from fairseq_autosize.html_report import Run, draw, read_run, write_report
from fairseq_autosize.training_log import TrainingLog

pytest.importorskip("matplotlib")

JSON = """\
2026-01-01 10:00:00 | INFO | fairseq_autosize.tasks._autosize | signature: prox:l21|seed:1
2026-01-01 10:00:00 | INFO | fairseq_autosize.tasks._autosize | command: fairseq-train DATA --prox l21
2026-01-01 10:00:01 | INFO | train_inner | {"epoch": 1, "loss": "9.5", "neurons_alive": "44", "neurons_pruned": "0", "ups": "2", "num_updates": "10", "train_wall": "1"}
2026-01-01 10:00:02 | INFO | fairseq_autosize.tasks._autosize | alive after update 20, layer by layer: encoder-ffn 12 3; decoder-ffn 10 0
2026-01-01 10:00:02 | INFO | train_inner | {"epoch": 1, "loss": "8.5", "neurons_alive": "25", "neurons_pruned": "19", "ups": "4", "num_updates": "20"}
2026-01-01 10:00:03 | INFO | valid | {"epoch": 1, "valid_loss": "8.25", "valid_ppl": null, "valid_num_updates": "20"}
2026-01-01 10:00:03 | INFO | train | {"epoch": 1, "train_loss": "9.0", "train_num_updates": "20"}
"""
SIMPLE = """\
2026-01-01 10:00:01 | INFO | train_inner | epoch 001:     10 / 12 loss=9.5, neurons_alive=44, neurons_pruned=0, ups=2, num_updates=10, lr=0.0025
2026-01-01 10:00:02 | INFO | train_inner | epoch 002:      8 / 12 loss=8.5, neurons_alive=25, neurons_pruned=19, ups=4, num_updates=20, lr=1.2e-05
2026-01-01 10:00:03 | INFO | valid | epoch 002 | valid on 'valid' subset | loss 8.25 | ppl inf | num_updates 20
2026-01-01 10:00:03 | INFO | train | epoch 002 | loss 9 | num_updates 20
"""
HYDRA, HYDRA_SIMPLE = (
    re.sub(r"^(\S+ \S+) \| INFO \| (\S+) \|", r"[\1,123][\2][INFO] -", text, flags=re.M)
    for text in (JSON, SIMPLE)
)
LOG_FILE = "\n".join(line.split(" | ")[-1] for line in JSON.splitlines()) + "\n"


def read(tmp_path, *texts):
    log = TrainingLog()
    for number, text in enumerate(texts):
        path = tmp_path / f"{number}.log"
        path.write_text(text)
        log.read(path)
    return log


@pytest.mark.parametrize(
    "text",
    [JSON, SIMPLE, HYDRA, HYDRA_SIMPLE, LOG_FILE, JSON + JSON, JSON + '... {"epoch": 2, "lo'],
)
def test_progress_of_every_format(text, tmp_path):
    log = read(tmp_path, text)
    assert log.series("train", "loss") == [(10, 9.5), (20, 8.5)]
    assert log.series("train", "neurons_pruned") == [(10, 0), (20, 19)]
    assert log.series("valid", "loss") == [(20, 8.25)]
    assert log.series("valid", "neurons_alive") == []


def test_the_end_of_an_epoch_has_counts(tmp_path):
    """With fairseq's interval of 100 updates a short training has no other line with them."""
    line = SIMPLE.splitlines(keepends=True)[-1]
    ends = [
        line.replace("num_updates 20", f"neurons_alive {alive} | num_updates {update}")
        for update, alive in ((6, 44), (12, 40), (20, 99))
    ]
    log = read(tmp_path, "".join(ends[:2]) + SIMPLE.replace(line, ends[2]))
    assert log.series("train", "neurons_alive") == [(6, 44), (10, 44), (20, 25)]
    assert log.series("train", "loss") == [(10, 9.5), (20, 8.5)]  # not the means of an epoch
    (tmp_path / "train.log").write_text("".join(ends))
    (tmp_path / "0.log").unlink()
    assert read_run(tmp_path).log.series("train", "neurons_alive")[-1] == (20, 99)


@pytest.mark.parametrize("text", [JSON, HYDRA])
def test_layers_and_notes(text, tmp_path):
    log = read(tmp_path, text)
    assert log.layers == {20: {"encoder-ffn": [12, 3], "decoder-ffn": [10, 0]}}
    assert log.notes == {"signature": "prox:l21|seed:1", "command": "fairseq-train DATA --prox l21"}


@pytest.mark.parametrize(
    "end", ["", " ", " encoder-ffn", " encoder-ffn 12;", " encoder-ffn 12; dec"]
)
def test_half_a_line_of_layers_is_skipped(end, tmp_path):
    log = read(tmp_path, f"{JSON}... | alive after update 30, layer by layer:{end}")
    assert list(log.layers) == [20]


def test_a_resumed_training_counts_as_last(tmp_path):
    again = JSON.replace('"8.5"', '"8.4"').replace('"num_updates": "10"', '"num_updates": "15"')
    log = read(tmp_path, JSON, again)
    assert log.series("train", "loss") == [(10, 9.5), (15, 9.5), (20, 8.4)]


@pytest.mark.parametrize("longer", [JSON, SIMPLE, HYDRA], ids=["json", "simple", "hydra"])
@pytest.mark.parametrize(
    ("line", "train", "valid", "layers"),
    [(2, [10, 15], [], []), (3, [10], [], [15]), (5, [10], [15], [])],
    ids=["training", "layers", "validation"],
)
def test_a_longer_attempt_before_is_forgotten(line, train, valid, layers, longer, tmp_path):
    """Begun anew with `tee -a`, or in a log of its own; a line tells that it is at update 15."""
    again = re.sub(r'(num_updates": "|update )\d+', r"\g<1>15", JSON.splitlines()[line]) + "\n"
    for texts in ([longer + again], [longer, again]):
        log = read(tmp_path, *texts)
        assert (list(log.train), list(log.valid), list(log.layers)) == (train, valid, layers)


@pytest.mark.parametrize(
    "tag", ["... | INFO | fairseq.trainer | ", "[..][fairseq.trainer][INFO] - "]
)
@pytest.mark.parametrize(
    ("line", "points"),
    [
        ("No existing checkpoint found out/checkpoint_last.pt", []),
        ("Loaded checkpoint old (1).pt (epoch 3 @ 0 updates)", []),
        ("Loaded checkpoint old.pt (epoch 3 @ 10 updates)", [10]),
    ],
)
def test_a_training_that_begins_anew_has_nothing_of_the_one_before(tag, line, points, tmp_path):
    log = read(tmp_path, f"{JSON}{tag}{line}\n")
    assert list(log.train) == points and not log.valid and not log.layers
    assert bool(log.notes) is bool(points)


def test_a_damaged_line_of_a_checkpoint_begins_nothing(tmp_path):
    log = read(tmp_path, f"{JSON}... | INFO | fairseq.trainer | Loaded checkpoint old.pt (epoch\n")
    assert list(log.train) == [10, 20] and log.valid and log.layers and log.notes


def test_half_a_line_of_numbers_begins_nothing(tmp_path):
    """It ends in num_updates=2, of which the 0 is still to be written."""
    half = SIMPLE.splitlines()[1].partition("0, lr=")[0]
    log = read(tmp_path, SIMPLE + half)
    assert half.endswith("num_updates=2") and list(log.train) == [10, 20]


def test_a_log_file_takes_no_layers_from_another(tmp_path):
    log = read(tmp_path, JSON, LOG_FILE)
    assert list(log.train) == [10, 20] and list(log.layers) == [20]


@pytest.mark.parametrize("stamped", [True, False])
def test_logs_of_a_folder_are_read_in_the_order_of_their_trainings(stamped, tmp_path):
    """By what they tell of the time, whatever a copy has made of the files'; else by those."""
    texts = [SIMPLE, SIMPLE.replace("num_updates=10", "num_updates=5")]
    texts = [texts[0], texts[1].splitlines()[0].replace("2026-01-01", "2026-01-02") + "\n"]
    for text, name, time_of_file in zip(texts, "ba", (9, 5) if stamped else (5, 9), strict=True):
        file = tmp_path / f"{name}.log"
        file.write_text(text if stamped else text.replace("2026-01-", ""))
        os.utime(file, (time_of_file, time_of_file))
    assert list(read_run(tmp_path).log.train) == [5]


@pytest.fixture
def folder(tmp_path):
    """A training's folder with a model of 44 neurons, of which 19 are dead, and a score."""
    path = tmp_path / "half"
    path.mkdir()
    model, args = build_model()
    for layer, alive in zip(feed_forward_in_state(model.state_dict()), (12, 3, 10, 0), strict=True):
        layer.fc1_weight[alive:] = 0
        layer.fc1_bias[alive:] = 0
    write_checkpoint(checkpoint_of(model, args), path / "checkpoint_last.pt")
    (path / "train.log").write_text(JSON)
    (path / "test.out").write_text(
        "H-0\t-1\tx\n... | Translated 1,000 sentences (12,345 tokens) in 7.9s "
        "(126.50 sentences/s, 1563.21 tokens/s)\nGenerate test with beam=5: BLEU4 = 31.25, 60.0/40.0/30.0/20.0 (BP=1.000)\n"
    )
    return path


def test_the_page_has_it_all_and_needs_nothing_else(folder, tmp_path, capsys):
    page, plots = tmp_path / "report.html", tmp_path / "plots"
    options = ["--output", str(page), "--plots", str(plots), "--title", "Ours & <theirs>"]
    assert main(["report", str(folder), f"again={folder}", *options]) == 0
    assert capsys.readouterr().out.startswith(f"wrote {page}\n")
    text = page.read_text()
    rows = re.findall(r"<tr>(.*?)</tr>", text, re.S)
    cells = [re.sub(r"<[^>]+>", " ", row).split() for row in rows]
    assert cells[1][:5] == ["half", "40", "25", "of", "44"]  # the checkpoint has 40 updates
    assert "31.2" in cells[1]
    assert cells[4][:2] == ["half", "20"] and "8.250" in cells[4] and "1,563" in cells[4]
    assert ["encoder-ffn", "12", "3", "12"] in cells and ["decoder-ffn", "10", "0", "10"] in cells
    (command, _) = re.findall(r"<h3>Command</h3>\n<pre>(.*?)</pre>", text)
    words = ["fairseq-train", "DATA", "--prox", "l21"]
    assert command == "".join(f"<span>{word}</span> " for word in words)
    assert "Ours &amp; &lt;theirs&gt;" in text
    # All that a browser would fetch is in the page.
    assert not re.search(r"""(src|href)=["'](?!data:)|url\(|@import|<script""", text)
    figures = text.count("data:image/svg+xml")
    assert figures == len(list(plots.glob("*.png"))) == 8
    # Spelled out in the last line, for the next time.
    assert "--title &#39;Ours &amp; &lt;theirs&gt;&#39; --plots" in text
    assert all(plot.read_bytes().startswith(b"\x89PNG") for plot in plots.glob("*.png"))


def curves(figure) -> dict[str, list[tuple[float, float]]]:
    """The labelled curves of a figure."""
    (axes,) = figure.axes
    lines = [line for line in axes.get_lines() if not line.get_label().startswith("_")]
    return {line.get_label(): [tuple(point) for point in line.get_xydata()] for line in lines}


def bars(figure) -> list[tuple[float, float]]:
    """Height and width of a figure's bars."""
    return [(bar.get_height(), bar.get_width()) for bar in figure.axes[0].patches]


def test_the_figures_show_what_was_logged(folder, tmp_path):
    """25 of 44 alive; the compact model has fewer parameters; the losses by the updates."""
    log = (folder / "train.log").read_text()
    more = log.splitlines()[-3].replace('"20"', '"30"').replace('"4"', '"9"')
    worse = log.splitlines()[-2].replace('"20"', '"30"').replace("8.25", "8.75")
    (folder / "train.log").write_text(f"{log}{more}\n{worse}\n")
    half, other = read_run(folder), read_run(folder, "other")
    half.tokens_per_second = {"flickr": 200.0, **half.tokens_per_second}
    other.tokens_per_second |= {"coco": 300.0}
    half.scores = {"rare": 1.0, "test": 31.25}
    other.scores = {"test": 30.0}
    plots = {plot.name: plot.figure for plot in draw([half, other])}
    share = 100 * 25 / 44
    assert curves(plots["neurons"])["half"] == [(10, 100), (20, share), (30, share)]
    layers = curves(plots["layers-half"])
    # The second layers have 3 of 12 and 0 of 10; to the end of the run, where they are the same.
    assert layers["encoder-ffn 2"] == [(20, 25), (30, 25)]
    assert layers["decoder-ffn 2"] == [(20, 0), (30, 0)]
    assert [height for height, _ in bars(plots["widths"])] == [12, 3, 10, 0] * 2
    assert curves(plots["loss"])["half"] == [(20, 8.25), (30, 8.75)]
    left = half.count["parameters"]["compact"] / 1e6
    assert left < half.count["parameters"]["total"] / 1e6
    assert curves(plots["size"]) == {"half": [(left, 31.25)], "other": [(left, 30.0)]}
    assert not plots["size"].axes[0].yaxis_inverted()
    assert [width for _, width in bars(plots["speed"])] == [4, 4]  # the median of 2, 4, 9
    # One test set, the first one that all have.
    assert [width for _, width in bars(plots["translation-speed"])] == [1563.21] * 2

    half.scores, other.scores = {}, {}
    plots = {plot.name: plot.figure for plot in draw([half, other])}
    assert curves(plots["size"])["half"] == [(left, 8.75)]
    assert plots["size"].axes[0].yaxis_inverted(), "up is better"


def test_counts_of_an_earlier_checkpoint_are_told_as_such(folder, tmp_path):
    """While it trains, and where an earlier checkpoint was the best."""
    run, same = read_run(folder), read_run(folder, "same")
    run.count["updates"], same.count["updates"] = 1012, 20  # the log ends at 20
    write_report([run, same], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    left, way = re.findall(r"<tr><td>half</td>(.*?)</tr>", page)
    assert left.startswith("<td>1,012</td><td>25 of 44</td>")
    assert way.startswith("<td>20</td><td>–</td><td>8.250 (20)</td><td>8.250</td>")
    left, way = re.findall(r"<tr><td>same</td>(.*?)</tr>", page)
    assert left.startswith("<td>20</td><td>25 of 44</td>")
    assert way.startswith("<td>20</td><td>8.250</td><td>8.250 (20)</td><td>8.250</td>")
    assert (
        "<th>validation loss of the checkpoint</th><th>best validation loss (update)</th>" in page
    )


def test_shares_are_those_of_the_start_after_a_compaction(tmp_path):
    """40 of 44, then 20; compacted to 20, of which 11 are left; the checkpoint has those only."""
    (tmp_path / "run").mkdir()
    model, args = build_model()
    for layer, alive in zip(feed_forward_in_state(model.state_dict()), (5, 3, 3, 0), strict=True):
        layer.fc1_weight[alive:] = 0
        layer.fc1_bias[alive:] = 0
    small = compact(checkpoint_of(model, args)).checkpoint
    write_checkpoint(small, tmp_path / "run" / "checkpoint_last.pt")
    line, layers = JSON.splitlines()[2], "... | alive after update {}, layer by layer: {}"
    told = []
    for update, alive, pruned, widths in (
        (10, 40, 4, "encoder-ffn 12 12; decoder-ffn 8 8"),
        (20, 20, 24, "encoder-ffn 6 6; decoder-ffn 4 4"),
        (30, 20, 0, "encoder-ffn 6 6; decoder-ffn 4 4"),
        (40, 11, 9, "encoder-ffn 5 3; decoder-ffn 3 0"),
    ):
        logged = line.replace('"44"', f'"{alive}"').replace('"0"', f'"{pruned}"')
        told += [layers.format(update, widths), logged.replace('"10"', f'"{update}"')]
    (tmp_path / "run" / "train.log").write_text("\n".join(told) + "\n")
    plots = {plot.name: plot.figure for plot in draw([read_run(tmp_path / "run")])}
    shares = [(u, 100 * n / 44) for u, n in ((10, 40), (20, 20), (30, 20), (40, 11))]
    assert curves(plots["neurons"])["run"] == shares
    assert curves(plots["layers-run"])["encoder-ffn 2"][-1] == (40, 25)


def test_the_table_has_the_best_loss_and_the_last(folder, tmp_path):
    log = (folder / "train.log").read_text()
    worse = log.splitlines()[-2].replace('"20"', '"30"').replace("8.25", "8.75")
    (folder / "train.log").write_text(f"{log}{worse}\n")
    assert main(["report", str(folder), "--output", str(tmp_path / "report.html")]) == 0
    assert "<td>8.250 (20)</td><td>8.750</td>" in (tmp_path / "report.html").read_text()


def test_bleu_of_the_validation(folder, tmp_path):
    """From --eval-bleu; against the size only where no test set was translated."""
    log = (folder / "train.log").read_text()
    loss = '"valid_loss": "8.25"'
    assert loss in log
    first = log.replace(loss, f'{loss}, "valid_bleu": "21.46"')
    later = first.splitlines()[-2].replace('"20"', '"30"').replace("21.46", "20.84")
    (folder / "train.log").write_text(f"{first}{later}\n")
    run, loss_only = read_run(folder), Run("other", read(tmp_path, log))
    plots = {plot.name: plot.figure for plot in draw([run, loss_only])}
    assert curves(plots["bleu"]) == {"half": [(20, 21.46), (30, 20.84)]}
    assert plots["size"].axes[0].get_ylabel() == "BLEU (test)"
    (folder / "test.out").unlink()
    plots = {plot.name: plot.figure for plot in draw([read_run(folder), loss_only])}
    left = run.count["parameters"]["compact"] / 1e6
    assert curves(plots["size"]) == {"half": [(left, 20.84)]}
    # Of several runs, all by what all have.
    loss_only.count = run.count
    both = {plot.name: plot.figure for plot in draw([read_run(folder), loss_only])}
    assert curves(both["size"]) == {"half": [(left, 8.25)], "other": [(left, 8.25)]}
    assert plots["size"].axes[0].get_ylabel() == "last validation BLEU"
    assert not plots["size"].axes[0].yaxis_inverted()
    assert main(["report", str(folder), "--output", str(tmp_path / "report.html")]) == 0
    assert "<td>21.5 (20)</td><td>20.8</td>" in (tmp_path / "report.html").read_text()


LINE = JSON.splitlines()[2]
VALID = JSON.splitlines()[5]
LAYERS = "... | alive after update 9, layer by layer: "


@pytest.mark.parametrize(
    "line",
    [
        *(LINE.replace('"10"', f'"{n}"') for n in ("inf", "nan", "-5", "1e300", "1" + "0" * 400)),
        "... | train_inner | " + '{"a": ' + "[" * 100_000,
        '... | train_inner | {"num_updates": {"a": 1}}',
        '... | train_inner | {"num_updates": 1' + "0" * 400 + "}",
    ],
)
def test_lines_of_no_update_are_skipped(line, tmp_path):
    log = read(tmp_path, f"{line}\n{JSON}{line}\n")
    assert sorted(log.train) == [10, 20] and sorted(log.valid) == [20]


@pytest.mark.parametrize(
    "lines",
    [
        [VALID.replace("8.25", "nan"), LINE.replace("9.5", "inf")],
        [
            VALID.replace("valid_loss", "valid_bleu").replace("8.25", bleu)
            for bleu in ("nan", "inf")
        ],
        [VALID.replace("8.25", "-3"), LINE.replace("9.5", "nan")],
        [JSON, VALID.replace("20", "30").replace("8.25", "inf"), LINE.replace('"2"', '"1e400"')],
        [LAYERS + "; ".join(f"kind{n} 1" for n in range(9)), LINE],
        [LAYERS + "encoder-ffn 1" + "0" * 5000, LINE],
        [LAYERS.replace("9", "9" * 30) + "encoder-ffn 1" + "0" * 400, LINE],
    ],
)
def test_values_that_cannot_be_drawn(lines, tmp_path):
    """Of a training that has diverged, or made up: the others are drawn."""
    log = read(tmp_path, "\n".join(lines) + "\n")
    for plot in draw([Run("a", log)]):
        assert plot.svg


LETTERS = "x | INFO | train_inner | " + "a" * 100_000
MANY_LAYERS = "\n".join(LAYERS.replace("9", str(n)) + "encoder-ffn 5 4" for n in range(30, 10_030))


@pytest.mark.parametrize("text", [LETTERS, MANY_LAYERS], ids=["a word", "ten thousand updates"])
def test_time_grows_no_faster_than_the_log(text, folder, tmp_path):
    """It did with the square of both: some minutes each."""
    (folder / "checkpoint_last.pt").unlink()  # which would tell the layers' sizes
    (folder / "train.log").write_text(f"{JSON}{text}\n")
    start = time.monotonic()
    assert main(["report", str(folder), "--output", str(tmp_path / "report.html")]) == 0
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("kind", ["posix.system", "half"])
def test_a_hostile_checkpoint_is_told_and_not_run(kind, folder, tmp_path, capsys):
    path = folder / "checkpoint_last.pt"
    if kind == "half":
        path.write_bytes(path.read_bytes()[:2000])
        told = "truncated or damaged"
    else:
        deep = gadgets(tmp_path / "canary")[kind]
        torch.save({**read_checkpoint(path), "extra_state": {"deep": deep}}, path)
        told = "carries code: it names "
    assert main(["report", str(folder), "--output", str(tmp_path / "report.html")]) == 0
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1
    assert not (tmp_path / "canary").exists()
    assert told in (tmp_path / "report.html").read_text()


def test_files_in_the_folder_that_cannot_be_read(folder, tmp_path, capsys):
    os.mkfifo(folder / "pipe.txt")
    (folder / "folder.out").mkdir()
    (folder / "result.json").mkdir()
    (folder / "checkpoint_last.pt").unlink()
    (folder / "checkpoint_last.pt").mkdir()
    assert main(["report", str(folder), "--output", str(tmp_path / "report.html")]) == 0
    error = capsys.readouterr().err
    assert "checkpoint_last.pt: is a directory" in error
    assert "result.json: no scores as expected" in error and error.count("\n") == 2
    (folder / "result.json").rmdir()
    page = tmp_path / "again.html"
    assert main(["report", str(folder), "--output", str(page)]) == 0
    assert "31.2" in page.read_text()  # of test.out


def test_nothing_is_overwritten_without_force(folder, tmp_path, capsys):
    page = tmp_path / "report.html"
    page.write_text("mine")
    assert main(["report", str(folder), "--output", str(page)]) == 2
    assert page.read_text() == "mine" and "--force" in capsys.readouterr().err
    assert main(["report", str(folder), "--output", str(page), "--force"]) == 0
    assert page.read_text().startswith("<!doctype html>")


def files_below(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_one_file_in_the_way_and_none_is_written(folder, tmp_path, capsys):
    page, plots = tmp_path / "report.html", tmp_path / "plots"
    command = ["report", str(folder), "--output", str(page), "--plots", str(plots)]
    page.write_text("mine")
    assert main(command) == 2
    assert not plots.exists()
    page.unlink()
    plots.mkdir()
    (plots / "loss.png").write_text("mine")
    before = files_below(tmp_path)
    assert main(command) == 2
    assert "loss.png: exists already" in capsys.readouterr().err
    assert files_below(tmp_path) == before  # no partial files either
    assert main([*command, "--force"]) == 0
    assert page.exists() and (plots / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_write_that_fails_leaves_the_old_files(folder, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    page, plots = tmp_path / "report.html", tmp_path / "plots"
    command = ["report", str(folder), "--output", str(page), "--plots", str(plots), "--force"]
    assert main(command) == 0
    before = files_below(tmp_path)
    save = Figure.savefig

    def full(figure, file, format, **options):
        if format == "png":
            raise OSError(28, "No space left on device")
        save(figure, file, format=format, **options)

    monkeypatch.setattr(Figure, "savefig", full)
    assert main([*command, "--title", "another"]) == 2
    assert files_below(tmp_path) == before


def test_runs_whose_figures_would_have_one_name(folder, tmp_path, capsys):
    runs = [f"a/b={folder}", f"a b={folder}"]
    page, plots = tmp_path / "report.html", tmp_path / "plots"
    assert main(["report", *runs, "--output", str(page), "--plots", str(plots)]) == 2
    assert "layers-a-b.png: two files to write have this name" in capsys.readouterr().err
    assert not page.exists() and not plots.exists()


def test_a_running_training_has_a_report(folder, tmp_path, capsys):
    (folder / "checkpoint_last.pt").unlink()
    (folder / "test.out").unlink()
    assert main(["report", str(folder), "--output", str(tmp_path / "report.html")]) == 0
    assert "no checkpoint_last.pt yet" in capsys.readouterr().err
    text = (tmp_path / "report.html").read_text()
    assert "no checkpoint_last.pt yet" in text and "prox:l21|seed:1" in text


def test_a_log_alone_tells_what_it_can(folder, tmp_path):
    log = folder / "train.log"
    log.write_text(log.read_text().replace("DATA --prox", "DATA --max-update 4000 --prox"))
    assert main(["report", f"a={log}", "--output", str(tmp_path / "report.html")]) == 0
    text = (tmp_path / "report.html").read_text()
    assert "<tr><td>a</td><td>25 of 44</td></tr>" in text
    assert "<tr><td>a</td><td>20 of 4,000</td><td>8.250 (20)</td>" in text
    assert "<tr><td>encoder-ffn</td><td>12</td><td>3</td><td></td></tr>" in text


def test_many_runs_have_colours_of_their_own(folder):
    plots = draw([read_run(folder, f"run {number}") for number in range(12)])
    (axes,) = plots[0].figure.axes
    assert len({line.get_color() for line in axes.get_lines()}) == 12


def test_scores_that_hardly_differ_do_not_fill_the_height(folder):
    runs = [read_run(folder, name) for name in "ab"]
    runs[1].scores = {"test": 31.3}
    plots = {plot.name: plot.figure for plot in draw(runs)}
    low, high = plots["size"].axes[0].get_ylim()
    assert high - low == pytest.approx(2) and low < 31.25 < 31.3 < high


def test_layers_without_neurons_are_seen(folder):
    plots = {plot.name: plot.figure for plot in draw([read_run(folder)])}
    (axes,) = plots["widths"].axes
    assert [text.get_text() for text in axes.texts] == ["", "", "", "0"]
    assert plots["layers-half"].axes[0].get_ylim()[0] < 0, "or the axis hides a line at 0"


def test_a_run_of_a_grid(folder, tmp_path):
    score = {"BLEU": {"score": 12.34, "signature": "tok:13a"}}
    score["rare"] = {"score": 10.0, "signature": "tok:13a", "lines": 7}
    told = {"scores": {"valid": score, "flickr": score}}
    told["tokens_per_second"] = {"valid": 7.0, "flickr": 99.0, "coco": None}
    told["commands"] = ["python -m fairseq_cli.train theirs", "python -m fairseq_cli.generate"]
    (folder / "result.json").write_text(json.dumps(told))
    # The checkpoint that has these scores, not the last one.
    (folder / "checkpoint_last.pt").rename(folder / "checkpoint_selected.pt")
    (folder / "checkpoint_last.pt").write_bytes(b"other")
    assert main(["report", str(folder), "--output", str(tmp_path / "report.html")]) == 0
    text = (tmp_path / "report.html").read_text()
    assert "BLEU (flickr)" in text and "12.3" in text
    assert '<h3>Scores</h3>\n<p class="sub">flickr, valid: BLEU tok:13a</p>' in text
    assert "25 of 44" in text and "flickr: rare" not in text and "<td>99</td>" in text
    assert "<th>tokens / s, translating flickr</th>" in text
    assert "<span>fairseq-train</span> " in text and "theirs" not in text
    log = (folder / "train.log").read_text()
    (folder / "train.log").write_text("\n".join(log.splitlines()[2:]) + "\n")
    assert read_run(folder).log.notes == {"command": "python -m fairseq_cli.train theirs"}
    plots = {plot.name: plot.figure for plot in draw([read_run(folder)])}
    assert plots["size"].axes[0].get_ylabel() == "BLEU (flickr)", "the test set"


def test_several_outputs_of_a_test_set(folder, tmp_path, capsys):
    """The newest counts, whatever its name, and the page says so."""
    for name, score, seconds in (("a.out", "30.00", 2000), ("z.txt", "20.00", 1000)):
        (folder / name).write_text(f"Generate test with beam=5: BLEU4 = {score}, 60.0/40.0\n")
        os.utime(folder / name, (seconds, seconds))
    os.utime(folder / "test.out", (1500, 1500))
    assert main(["report", str(folder), "--output", str(tmp_path / "report.html")]) == 0
    text = (tmp_path / "report.html").read_text()
    assert "test.out and a.out have BLEU of test; shown is that of a.out, which is newer" in text
    assert read_run(folder).scores == {"test": 30.0}
    assert len(read_run(folder).signatures) == 1


def test_a_name_that_matplotlib_would_leave_out(folder):
    figure = draw([read_run(folder, "_a"), read_run(folder, "b")])[0].figure
    (legend,) = figure.legends
    told = [text.get_text() for text in legend.get_texts()]
    assert [name.strip("\u200b") for name in told] == ["_a", "b"]


def test_odd_names(folder, tmp_path):
    """A link that leads nowhere, a folder, and what matplotlib takes for a formula."""
    (folder / "latest.log").symlink_to("gone.log")
    (folder / "old.log").mkdir()
    runs = [f"x$^$={folder}", f"$y={folder}"]
    assert main(["report", *runs, "--output", str(tmp_path / "report.html")]) == 0
    assert "x$^$" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    "content",
    [
        *("[]", "{", '{"scores": {"test": 3}}'),
        '{"scores": {"test": {"BLEU": {"score": NaN, "signature": ""}}}}',
        '{"scores": {}, "tokens_per_second": {"test": Infinity}}',
    ],
)
def test_a_broken_result_is_told(content, folder, tmp_path, capsys):
    (folder / "result.json").write_text(content)
    assert main(["report", str(folder), "--output", str(tmp_path / "report.html")]) == 0
    assert "result.json: no scores as expected" in capsys.readouterr().err


def test_names_from_outside_do_not_reach_the_page_as_code(folder, tmp_path):
    hostile = JSON.replace("DATA", "<script>alert(1)</script>")
    (folder / "train.log").write_text(hostile)
    run = f"<b>x</b>={folder}"
    assert main(["report", run, "--output", str(tmp_path / "report.html")]) == 0
    text = (tmp_path / "report.html").read_text()
    assert "<script" not in text and "<b>" not in text


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda path: None, "cannot read: No such file"),
        (lambda path: path.mkdir(), "no *.log in it"),
        (lambda path: path.write_bytes(b"\x00\xff nothing\n"), "no progress lines"),
    ],
)
def test_what_is_no_training(make, told, tmp_path, capsys):
    make(tmp_path / "run")
    options = ["--output", str(tmp_path / "report.html")]
    assert main(["report", str(tmp_path / "run"), *options]) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1
    assert not (tmp_path / "report.html").exists()


def test_runs_of_one_name_are_told_apart_by_their_folders(folder, tmp_path):
    runs = [tmp_path / pair / way / "seed-1" for pair in ("hau", "ibo") for way in ("half", "none")]
    for run in runs:
        shutil.copytree(folder, run)
    output = tmp_path / "report.html"
    assert main(["report", *map(str, runs), str(folder), "--output", str(output)]) == 0
    text = output.read_text()
    names = [
        "half",
        *(f"{pair}/{way}/seed-1" for pair in ("hau", "ibo") for way in ("half", "none")),
    ]
    assert all(f">{name}<" in text for name in names)


def test_long_names_fit_into_the_legend(folder):
    runs = [read_run(folder, f"{'long-name/' * 4}{number}") for number in range(5)]
    (neurons,) = (plot.figure for plot in draw(runs) if plot.name == "neurons")
    neurons.savefig(io.BytesIO(), dpi=neurons.dpi)  # which lays it out
    (legend,) = neurons.legends
    assert legend.get_window_extent().x1 <= neurons.bbox.x1


def test_two_runs_of_one_name(folder, tmp_path, capsys):
    assert main(["report", str(folder), str(folder), "--output", str(tmp_path / "r.html")]) == 2
    assert "two runs are named half" in capsys.readouterr().err


@pytest.mark.heavy
def test_a_real_training_tells_its_layers(corpus, run, tmp_path):
    output = run(
        *("fairseq_cli.train", corpus, "--user-dir", USER_DIR, *TINY_MODEL, *TINY_TRAINING),
        *("--prox", "l21", "--prox-target-sparsity", "0.5", "--max-update", "40"),
        *("--log-format", "simple", "--save-dir", tmp_path),
    ).stdout
    (tmp_path / "train.log").write_text(output)
    log = TrainingLog()
    log.read(tmp_path / "train.log")
    assert min(log.layers) == 1 and log.layers[1] == {
        "encoder-ffn": [24] * 2,
        "decoder-ffn": [24] * 2,
    }
    assert sum(map(sum, log.layers[max(log.layers)].values())) == 48
    assert max(log.train) == 40 and log.series("valid", "loss")
    assert "--prox l21 --prox-target-sparsity 0.5" in log.notes["command"]
    assert log.notes["command"].startswith(f"python -m fairseq_cli.train {corpus} ")
    assert main(["report", str(tmp_path), "--output", str(tmp_path / "report.html")]) == 0
    assert "48 of 96" in (tmp_path / "report.html").read_text()


@pytest.mark.heavy
@pytest.mark.parametrize("form", ["json", "simple"])
def test_a_real_training_of_hydra_train_is_read(form, corpus, run, tmp_path):
    layers = {"layers": 2, "embed_dim": 16, "ffn_embed_dim": 24, "attention_heads": 2}
    common = {"user_dir": str(USER_DIR), "cpu": True, "log_format": form, "log_interval": 2}
    task = {"_name": "translation_autosize", "prox": "l21", "prox_target_sparsity": 0.5}
    config = {
        "common": common,
        "task": {**task, "data": str(corpus)},
        "model": {"_name": "transformer", "encoder": layers, "decoder": layers},
        "criterion": {"_name": "cross_entropy"},
        "optimizer": {"_name": "adam"},
        "lr_scheduler": {"_name": "inverse_sqrt", "warmup_updates": 5},
        "dataset": {"max_tokens": 400, "required_batch_size_multiple": 1, "num_workers": 0},
        "optimization": {"max_update": 20, "lr": [0.005]},
        "checkpoint": {"no_epoch_checkpoints": True},
    }
    (tmp_path / "mine.yaml").write_text("# @package _group_\n" + json.dumps(config))
    options = ["--config-dir", tmp_path, "--config-name", "mine", "hydra.run.dir=."]
    run("fairseq_cli.hydra_train", *options, cwd=tmp_path)
    log = read_run(tmp_path).log
    assert sorted(log.train) == list(range(2, 21, 2)) and max(log.valid) == 20
    assert log.series("train", "neurons_alive")[-1] == (20, 48)
    assert sum(map(sum, log.layers[max(log.layers)].values())) == 48
    assert log.notes["command"].startswith("python -m fairseq_cli.hydra_train ")
    assert "--config-name mine" in log.notes["command"] and "l21" in log.notes["signature"]
    assert read_run(tmp_path).count["ffn_neurons"]["alive"] == 48  # of checkpoints/
