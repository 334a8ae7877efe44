"""What the examples of other libraries print."""

import re

from programs import ROOT


def losses(output):
    """By the name before them."""
    return {name: float(loss) for name, loss in re.findall(r"^(\w+) +loss (\S+)$", output, re.M)}


def assert_documented(output):
    """That its report is the one in the documentation, which says that every kernel is 2:4."""
    report = output[re.search(r"^ *[\d.]+% zeros", output, re.M).start() :]
    assert report.endswith("2 of 2 leaves to prune are 2:4 along their axes\n")
    assert report in (ROOT / "docs/examples.md").read_text()
