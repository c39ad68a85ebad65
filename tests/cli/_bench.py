"""`fastpo bench`, as its command runs it."""

import json

from fastpo import cli


def bench(*arguments, out):
    code = cli.main(["bench", *arguments, "--out", str(out)])
    return code, json.loads(out.read_text())
