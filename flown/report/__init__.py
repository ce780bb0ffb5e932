"""From report cards, curves and rows to tables on a terminal and one self-contained HTML file."""

from flown.report.finetuning import print_table3
from flown.report.html import write_report
from flown.report.novelty import print_study
from flown.report.terminal import print_card, print_table

__all__ = ["print_card", "print_study", "print_table", "print_table3", "write_report"]
