"""From a report card and loss curves to tables on a terminal and one self-contained HTML file."""

from flown.report.html import write_report
from flown.report.terminal import print_card

__all__ = ["print_card", "write_report"]
