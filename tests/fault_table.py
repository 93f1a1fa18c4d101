"""The faults that a run survives, each with the tests that cause it: `python tests/fault_table.py` writes the table
into docs/reliability.md. A test names its faults by `@pytest.mark.fault(7, 8)`."""

import ast
from collections import defaultdict
from pathlib import Path

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "reliability.md"
BEGIN, END = "<!-- faults: written by tests/fault_table.py -->", "<!-- end of faults -->"

FAULTS: dict[int, tuple[str, str]] = {
    1: ("SIGKILL of one rank in a step", "all ranks exit within 60 s, not with 0; the next start resumes bitwise"),
    2: ("SIGKILL in a save, while files are written", "the last valid one is used, the half-written removed later"),
    3: ("SIGKILL in a save, between two ranks' files", "the same"),
    4: ("SIGKILL in a save, before the pointer", "the new checkpoint counts: the pointer is only a hint"),
    5: ("power cut in the pointer's window", "never a pointer to a bad checkpoint"),
    6: ("disk full while saving", "ends with one line; old checkpoints are intact"),
    7: ("truncated checkpoint file", "refused, the next older checkpoint is used and named"),
    8: ("flipped bits in a checkpoint", "refused by checksum"),
    9: ("missing, empty or bogus pointer", "the newest valid checkpoint is looked for; never step 0 in silence"),
    10: ("all checkpoints invalid", "exit status 2, not requeued, with what to do"),
    11: ("another number of ranks", "resumes"),
    12: ("another ZeRO stage, another accumulation", "resumes"),
    13: ("lock of a dead run", "taken over when its owner is provably dead"),
    14: ("two runs on one run directory", "the second refuses and names the first"),
    15: ("an old rank trains on after a new start", "its checkpoints are fenced off by the generation"),
    16: ("SIGUSR2, SIGTERM or SIGINT to any rank", "checkpoint at the step boundary, exit status 75"),
    17: ("launcher stopped, killed or gone", "ranks notice, save and exit"),
    18: ("killed in the save that a signal asked for", "the checkpoint before it is intact"),
    19: ("second signal", "ignored while a save runs; a second SIGINT ends the process otherwise"),
    20: ("starts that fail without progress", "after 3 a diagnosis and status 2; an end after 10 that never trained"),
    21: ("node lost", "the other ranks exit; the job is requeued"),
    22: ("slurmctld restarted", "the job is unaffected"),
    23: ("rank stopped (SIGSTOP), hung collective", "stacks of all that answer, the silent one named, an end in time"),
    24: ("one slow rank", "named in the metrics; by the preflight, its node"),
    25: ("loader worker killed, as for lack of memory", "one line and an end, no hang"),
    26: ("truncated shard", "what it lost is substituted, counted and named"),
    27: ("shard whose bytes changed", "the same"),
    28: ("sample that is no image, or empty", "substituted, counted and named"),
    29: ("labels beyond num_classes, index of another dataset", "refused before step 1"),
    30: ("HTTP 500, short bodies, stalls of a shard server", "bounded retries, then an error that names the shard"),
    31: ("NaN or spiking loss", "update skipped; then a roll-back with other data; then a report"),
    32: ("malicious pickle", "never executed"),
    33: ("paths out of a tar's folder", "rejected"),
    34: ("decompression bomb", "rejected before it is decoded"),
    35: ("TensorBoard's directory cannot be written, clock set back", "told once; training goes on"),
    36: ("config changed against the run directory's", "refused with the keys, unless allowed"),
}  # fmt: skip


def named_tests() -> dict[int, list[str]]:
    """Fault number -> `file::test` of every test that names it, and the mark `slow` where it has it."""
    found: dict[int, list[str]] = defaultdict(list)
    for path in sorted(TESTS.rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.FunctionDef):
                continue
            marks = {ast.unparse(decorator) for decorator in node.decorator_list}
            slow = " (slow)" if "pytest.mark.slow" in marks else ""
            for decorator in node.decorator_list:
                if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "pytest.mark.fault":
                    for number in decorator.args:
                        name = f"{path.relative_to(TESTS).as_posix()}::{node.name}{slow}"
                        found[ast.literal_eval(number)].append(name)
    return found


def table() -> str:
    """The table as Markdown."""
    lines = ["| # | fault | what happens | tests |", "|--:|---|---|---|"]
    known = named_tests()
    for number, (fault, expected) in FAULTS.items():
        tests = "<br>".join(f"`{name}`" for name in known[number])
        lines.append(f"| {number} | {fault} | {expected} | {tests} |")
    return "\n".join(lines)


def with_table(page: str) -> str:
    """The page with the table as it should be."""
    return with_part(page, BEGIN, END, table())


def with_part(page: str, begin: str, end: str, text: str) -> str:
    """The page with `text` between two lines of it."""
    before, rest = page.split(begin)
    return f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}"


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
