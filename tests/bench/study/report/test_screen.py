"""The study's report as a phone, a screen and a screen in the dark show it."""

from screens import check_page, looked_at, needs_chromium

from ironmoe.bench.study.claims.table import verdicts
from ironmoe.bench.study.report.figures.over_experts import OVER_EXPERTS
from ironmoe.bench.study.report.page import write_study_report


@needs_chromium
def test_the_report_of_a_study_fits_a_phone_and_a_screen_and_has_a_dark_mode(made_up, tmp_path):
    study = made_up(("dense", "E2", "E8", "E8-renorm"), trainings=("standard", "pgd-at"))
    found = verdicts(study.rows, study.arms)
    write_study_report(
        tmp_path, study.facts, study.rows, found, study.arms, figures=(OVER_EXPERTS,)
    )
    pages = {"study": tmp_path / "report.html"}
    for dark in (False, True):
        for seen in looked_at(pages, (400, 1280), tmp_path, dark=dark).values():
            check_page(seen, dark=dark)
            assert seen["sortable"] > 20
