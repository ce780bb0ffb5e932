"""Report cards, curves and rows as tables on a terminal and as self-contained pages."""

from flown.report.card import print_card, write_report
from flown.report.finetuning import print_table3
from flown.report.novelty import print_study
from flown.report.page import Section

__all__ = ["Section", "print_card", "print_study", "print_table3", "write_report"]
