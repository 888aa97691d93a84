#!/usr/bin/env python3
"""Replace the targets of a training set by a teacher's translations, for distillation.

    python scripts/distill_data.py TEACHER DATA DEST --teacher-data DIR
    python scripts/prepare_data.py my-distilled-pair data/distilled --source DEST ...

Sequence-level knowledge distillation (Kim and Rush, 2016, https://aclanthology.org/D16-1139): a
student, here the model that is to be auto-sized, learns from what a better model translates. DEST
is a folder of text with that training set, the other splits as they are, and the teacher's log.
Options that are not named below go to fairseq-interactive and come last: --cpu, --fp16, ...
"""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import shutil
import sys
from pathlib import Path

import pipeline
from pipeline import RunError
from prepare_data import REMOVE_BPE, encode

logger = logging.getLogger("distill_data")

# How fairseq-interactive cuts a line into the subwords of prepare_data.py.
SEGMENT = {
    "sentencepiece": ("sentencepiece", "--sentencepiece-model", "spm.model"),
    "subword-nmt": ("subword_nmt", "--bpe-codes", "bpe.codes"),
}


def beside(dest: Path) -> Path:
    """Where DEST is made."""
    return dest.with_name(f"{dest.name}.part")


def translate(args: argparse.Namespace, source: Path, lines: int, log: Path) -> dict[int, str]:
    """The teacher's translations of a text by line, without those that are too long for it."""
    languages, bpe = args.record["languages"], args.teacher_record["bpe"]
    command = [sys.executable, "-m", "fairseq_cli.interactive", str(args.teacher_data / "data-bin")]
    command += ["--source-lang", languages[0], "--target-lang", languages[1]]
    command += ["--user-dir", str(pipeline.USER_DIR), "--path", args.teacher]
    command += ["--input", str(source), "--buffer-size", "10000", "--max-tokens", "4000"]
    if bpe in SEGMENT:
        name, option, file = SEGMENT[bpe]
        command += ["--bpe", name, option, str(args.teacher_data / file)]
    command += ["--skip-invalid-size-inputs-valid-test"]
    command += [*shlex.split(REMOVE_BPE[bpe]), "--beam", "5", *args.options]
    logger.info("translating %d lines, log in %s", lines, log)
    pipeline.execute(command, log)
    return pipeline.translations(log)


def distill(args: argparse.Namespace) -> None:
    """Do the whole work; DEST is there when it is complete."""
    languages = args.record["languages"]
    working = beside(args.dest)
    working.mkdir(parents=True)
    for text in (args.data / "raw").iterdir():
        shutil.copy(text, working)
    source, target = (working / f"train.{language}" for language in languages)
    references = pipeline.lines_of(target)
    log = working / "translations.out"
    found = translate(args, source, len(references), log)
    if not found:
        raise RunError(f"{log}: no translations")
    score = pipeline.scores(list(found.values()), [references[i] for i in found])["BLEU"]["score"]
    target.write_bytes(encode([found.get(i, own) for i, own in enumerate(references)]))
    working.rename(args.dest)
    logger.info("%s: BLEU %.1f against the training set's own targets", args.dest, score)
    if kept := len(references) - len(found):
        logger.warning("%d lines are too long for the teacher and keep their own targets", kept)
    if empty := list(found.values()).count(""):
        logger.warning("%d translations are empty; prepare_data.py drops those pairs", empty)
    prepare = ["python", "scripts/prepare_data.py", f"{args.dest.name}", f"data/{args.dest.name}"]
    prepare += ["--source", str(args.dest)]
    prepare += ["--source-lang", languages[0], "--target-lang", languages[1]]
    logger.info("Next: %s", shlex.join(prepare))


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("teacher", metavar="TEACHER", help="checkpoint, or several joined by : as an ensemble")
    add("data", metavar="DATA", type=Path, help="the student's folder, made by prepare_data.py")
    add("dest", metavar="DEST", type=Path, help="folder to make; must not exist")
    text = "folder of prepare_data.py with the teacher's subwords (default: DATA)"
    add("--teacher-data", metavar="DIR", type=Path, help=text)
    args, args.options = parser.parse_known_args(argv)
    args.teacher_data = args.teacher_data or args.data
    for checkpoint in args.teacher.split(os.pathsep):
        if not Path(checkpoint).is_file():
            parser.error(f"TEACHER {checkpoint}: no such file")
    if args.dest.exists():
        parser.error(f"DEST {args.dest}: exists already; choose another name, or remove it")
    if beside(args.dest).exists():
        told = "is there, of a start that failed or still runs"
        parser.error(
            f"DEST {args.dest}: {beside(args.dest)} {told}; remove it, or choose another name"
        )
    try:
        pipeline.check_path(args.data, "DATA")
        pipeline.check_path(args.teacher_data, "--teacher-data")
        args.record = pipeline.record_of(args.data, "DATA")
        args.teacher_record = pipeline.record_of(args.teacher_data, "--teacher-data")
    except RunError as error:
        parser.error(str(error))
    taught, wanted = args.teacher_record["languages"], args.record["languages"]
    if taught != wanted:
        parser.error(
            f"--teacher-data {args.teacher_data}: translates {' to '.join(taught)}, DATA "
            f"{args.data} {' to '.join(wanted)}"
        )
    return args


def main(argv: list[str] | None = None) -> int:
    """Entry point; 0, or 2 after a message on standard error."""
    args = parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    pipeline.end_with_commands()
    try:
        distill(args)
    except (RunError, OSError) as error:
        print(f"distill_data.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
