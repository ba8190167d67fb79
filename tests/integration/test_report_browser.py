"""The report, the comparison and the live page in a browser: what is on them is what the run's files say."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from groupwise.quickstart.tiny_model import build_tiny_model
from groupwise.report import write_report
from groupwise.report.live import LiveServer
from groupwise.trajectories import (
    SegmentRow,
    TrajectoryRow,
    eval_to_json,
    read_eval_trajectories,
    read_trajectories,
    to_json,
)
from groupwise.wishes import FILES
from tests.made_run import add_step, evaluated, lines, make_run, rollout

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright and Chromium")
BROWSER = os.environ.get("GROUPWISE_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="needs Chromium: apt-get install chromium, or GROUPWISE_CHROMIUM"),
]

HOSTILE = (
    "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>",
    "right \u202e to left \u2066 and \u200b nothing",
    "\ud83d half, \udc00 other half, \x00 nought, \x1b[31mred",
    "']}); window.hacked = 3; //\u2028 line \\u0041 &lt;b&gt; {{x}} ${x}",
    "A" * 100_000,
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


Open = Callable[..., Any]


@pytest.fixture
def open_page(browser: Any) -> Iterator[Open]:
    """Opens a page; in the end nothing was complained of, and nobody else was asked for anything."""
    pages: list[Any] = []
    complaints: list[str] = []
    asked: list[str] = []

    def open_it(address: str, *, width: int = 1280, dark: bool = False, ready: bool = True) -> Any:
        scheme = "dark" if dark else "light"
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        pages.append(page)
        page.set_default_timeout(20_000)
        page.on("console", lambda said: complaints.append(said.text) if said.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(address)
        if ready:
            page.wait_for_selector("body[data-ready]")
        return page

    yield open_it
    for page in pages:
        assert page.evaluate("window.hacked") is None
        page.close()
    assert not complaints
    assert all(url.startswith(("file://", "http://127.0.0.1:")) for url in asked), asked


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    build_tiny_model(folder, texts=["one two three"], size="0.1m", vocab_size=259)
    return folder / "tokenizer.json"


@pytest.fixture
def run(tmp_path: Path, tokenizer: Path) -> Path:
    run = make_run(tmp_path / "run", steps=20, groups=6, samples=4, rows=60)
    (run / "final").mkdir()
    shutil.copy(tokenizer, run / "final")
    return run


def written(run: Path, *others: Path, **settings: Any) -> str:
    return write_report([run, *others], run / "report.html", **settings).path.absolute().as_uri()


def tab(page: Any, name: str) -> None:
    page.get_by_role("tab", name=name).click()


def show(page: Any, step: int, group: int) -> None:
    """One group, whole."""
    page.evaluate(f"location.hash = '#samples/0/{step}/{group}'")
    page.get_by_role("heading", name=f"Step {step}, group {group}").wait_for()
    page.locator(".card").first.wait_for()


def about(page: Any) -> dict[str, str]:
    """What is said of the token under the pointer."""
    names = page.locator(".about [data-about]").evaluate_all("nodes => nodes.map(n => [n.dataset.about, n.innerText])")
    return {name: text.removeprefix(name).strip() for name, text in names}


def count(page: Any) -> int:
    page.wait_for_timeout(500)
    return int(page.locator(".pages [role=status]").inner_text().split()[0].replace(",", ""))


def test_numbers_under_the_pointer_are_those_of_the_files(run: Path, open_page: Open) -> None:
    from tokenizers import Tokenizer

    texts = Tokenizer.from_file(str(run / "final" / "tokenizer.json"))
    page = open_page(written(run))
    for step, group in ((1, 2), (20, 117)):
        show(page, step, group)
        for row in (row for row in read_trajectories(run, [step]) if row.group == group):
            card = page.locator(f".card[data-sample='{row.sample_index}']")
            page.get_by_label("colour tokens by").select_option("plain")
            assert card.locator(".answer").inner_text() == row.completion
            assert float(card.locator(".reward").inner_text()) == row.reward
            page.get_by_label("colour tokens by").select_option("logprob")
            tokens = card.locator("[data-token]")
            assert tokens.count() == len(row.token_ids)
            for place in (0, 5, 11):
                tokens.nth(place).hover()
                said = about(page)
                assert int(said["number"]) == row.token_ids[place]
                assert float(said["log-prob"]) == pytest.approx(row.logprobs[place], rel=1e-4)
                assert float(said["credit"]) == row.advantage
                assert said["weights"] == f"version {step - 1}"
                single = texts.decode([row.token_ids[place]], skip_special_tokens=False)
                if single.isprintable() and "\N{REPLACEMENT CHARACTER}" not in single:
                    assert json.loads(said["token"]).endswith(single)  # behind bytes that are no character


def test_colours_grow_with_what_they_show(run: Path, open_page: Open) -> None:
    values = (-0.001, -4.9, *[0.0] * 10)
    credit = (1.0, -0.5, *[0.0] * 10)
    lines(
        run / "trajectories/step_000021.jsonl",
        [
            to_json(
                rollout(
                    21,
                    500,
                    0,
                    logprobs=values,
                    credit=credit,
                    scores={"reference": (-1.0,) * 12, "policy": (-2.0,) * 12},
                )
            )
        ],
    )
    page = open_page(written(run))
    show(page, 21, 500)

    def painted(way: str) -> list[str]:
        page.get_by_label("colour tokens by").select_option(way)
        return page.locator("[data-token]").evaluate_all("nodes => nodes.map(n => n.style.background)")

    trainer = painted("gap:policy")
    assert "--high" in trainer[0]
    assert "--low" in trainer[1]
    logprobs, credits, gaps = painted("logprob"), painted("credit"), painted("gap:reference")
    assert logprobs[0] == logprobs[2] == ""
    assert "--low" in logprobs[1]
    assert "69%" in logprobs[1]
    assert ["--high" in credits[0], "--low" in credits[1], credits[2]] == [True, True, ""]
    assert ["70%" in credits[0], "35%" in credits[1]] == [True, True]
    page.locator("[data-token]").nth(1).hover()
    assert about(page)["gap to reference"] == "-3.9"
    assert (about(page)["trainer's log-prob"], about(page)["gap to the trainer"]) == ("-2", "-2.9")
    assert "--low" in gaps[1]
    assert "--high" in gaps[0]


def test_filters_and_search_find_what_the_files_have(run: Path, open_page: Open) -> None:
    extra = [
        rollout(21, 500, 0, finish_reason="length", reward=3.0),
        rollout(21, 500, 1, status="failed", boundary="reward", cause="it <b>broke</b>", reward=None),
        rollout(21, 501, 0, segments=(SegmentRow("model", "a NEEDLE here", 12),)),
    ]
    lines(run / "trajectories/step_000021.jsonl", map(to_json, extra))
    page = open_page(written(run))
    tab(page, "Samples")
    groups: dict[tuple[int, int], list[TrajectoryRow]] = {}
    for row in read_trajectories(run):
        groups.setdefault((row.step, row.group), []).append(row)
    spreads = [{row.reward for row in rows if row.reward is not None} for rows in groups.values()]
    assert count(page) == len(groups) == 122
    page.get_by_label("show").first.select_option("differ")
    assert count(page) == sum(len(values) > 1 for values in spreads)
    page.get_by_label("show").first.select_option("equal")
    assert count(page) == sum(len(values) == 1 for values in spreads)
    for kind in ("cut", "failed"):
        page.get_by_label("show").first.select_option(kind)
        assert count(page) == 1
    page.locator("[data-group]").first.click()
    page.get_by_text("it <b>broke</b>").wait_for()
    assert page.get_by_text("failed in its reward").count() == 1
    page.get_by_label("show").first.select_option("all")
    for text, found in (("needle", 1), ("of step 7:", 6), ("nowhere", 0), ("question 3, please", 1)):
        page.get_by_placeholder("in prompts and answers").fill(text)
        assert count(page) == found, text
    page.get_by_placeholder("in prompts and answers").fill("")
    page.get_by_label("steps from").fill("3")
    page.get_by_label("to", exact=True).first.fill("4")
    assert count(page) == 12
    page.get_by_label("steps from").fill("")
    page.get_by_label("to", exact=True).first.fill("")
    page.get_by_label("sort").select_option("best")
    assert count(page) == 122
    assert page.locator(".groups tbody tr").first.locator("td").nth(1).inner_text() == "3"


def test_texts_of_models_are_texts(run: Path, open_page: Open) -> None:
    for number, text in enumerate(HOSTILE):
        segment = SegmentRow("model", text, 12)
        row = rollout(21, 600 + number, 0, segments=(segment,), prompt=text, uid=text[:40], cause=text)
        values = to_json(row)
        values["segments"][0]["chars"] = len(text)  # our own writer spells halves of characters out, and counts that
        lines(run / "trajectories/step_000021.jsonl", [values], escaped=True)
    raw = json.dumps(to_json(rollout(21, 700, 0, uid="nan"))).replace('"advantage": ', '"advantage": NaN, "was": ')
    with (run / "trajectories/step_000021.jsonl").open("a") as file:
        file.write(raw + "\n")
    page = open_page(written(run))
    for number, text in enumerate(HOSTILE):
        show(page, 21, 600 + number)
        page.get_by_label("colour tokens by").select_option("plain")
        held = page.locator(".card .answer").evaluate("node => node.textContent")
        if len(text) < 1000:
            plain = "".join(c if c.isprintable() or c == " " else f"U+{ord(c):04X}" for c in text)
            assert held == plain
        else:
            assert held.startswith("A" * 60_000)
            page.get_by_text("40,000 more characters").last.click()
            assert page.locator(".card .answer").evaluate("node => node.textContent.length") == 100_000
        page.get_by_label("colour tokens by").select_option("credit")
        page.locator("[data-token]").nth(3).hover()
    show(page, 21, 700)
    assert page.get_by_text("advantage –").count() == 1


def test_evaluations_row_by_row(run: Path, open_page: Open) -> None:
    page = open_page(written(run))
    tab(page, "Evaluations")
    first, last = ({row.uid: row.correct for row in read_eval_trajectories(run, [step])} for step in (0, 20))
    right = [uid for uid in first if last[uid] and not first[uid]]
    wrong = [uid for uid in first if first[uid] and not last[uid]]
    said = page.get_by_role("status").filter(has_text="became right").inner_text()
    assert f"{len(right)} row" in said
    assert f"{len(wrong)} became wrong" in said
    assert page.locator("[data-row]").count() == len(right)
    page.locator("[data-row]").first.click()
    page.get_by_text(f"step 20 says {int(right[0][1:])}", exact=True).wait_for()
    assert page.locator(".card.wrong").count() == 1
    assert page.locator(".card.right").count() == 1


def test_rows_of_several_samples_are_all_counted(run: Path, tmp_path: Path, open_page: Open) -> None:
    other = make_run(tmp_path / "several", rows=0)
    for step in (0, 6):
        rows = [
            replace(evaluated(step, row), sample_index=sample, correct=sample < row % 3)
            for row in range(9 + (step == 6))
            for sample in range(2)
        ]
        lines(other / f"trajectories/eval_{step:06d}.jsonl", map(eval_to_json, rows))
    page = open_page(written(other))
    tab(page, "Evaluations")
    said = page.get_by_role("status").filter(has_text="became right").inner_text()
    assert said == (
        "From step 0 to 6: 0 rows became right, 0 became wrong, 3 stayed right, 3 stayed wrong, "
        "3 stayed right in part; 1 not in both."
    )
    page.get_by_label("show").select_option("part")
    assert page.locator("[data-row]").count() == 3


def test_two_runs_over_each_other(run: Path, tmp_path: Path, open_page: Open) -> None:
    other = make_run(tmp_path / "other", steps=60, groups=2, samples=2, rows=60)
    config = json.loads((other / "config.json").read_text())
    config["optim"]["lr"] = 7e-5
    (other / "config.json").write_text(json.dumps(config))
    page = open_page(written(run, other))
    pairs = [(evaluated(20, row).correct, evaluated(60, row).correct) for row in range(60)]
    tab(page, "Evaluations")
    said = page.locator(".comparison .headline").inner_text()
    assert f"better in {sum(b > a for a, b in pairs)} rows and worse in {sum(b < a for a, b in pairs)}" in said
    assert page.locator(".comparison tbody tr").count() == sum(a != b for a, b in pairs)
    page.locator(".comparison button.prompt").first.click()
    page.locator(".comparison .card").nth(1).wait_for()
    tab(page, "Settings")
    differ = page.get_by_role("region", name="settings that differ").inner_text()
    assert "optim.lr" in differ
    assert "7e-05" in differ
    assert "train.steps" in differ
    assert "train.seed" not in differ
    tab(page, "Curves")
    panel = page.get_by_role("region", name="Reward", exact=True)
    panel.locator("summary").click()
    panel.locator(".values td").first.wait_for()
    heads = panel.locator(".values th[scope=col]").all_inner_texts()
    assert heads == ["step", "run", "other"]
    assert panel.locator(".values tbody tr").count() == 60


def test_values_of_curves_are_those_of_the_metrics(run: Path, open_page: Open) -> None:
    page = open_page(written(run))
    tab(page, "Curves")
    panel = page.get_by_role("region", name="Reward", exact=True)
    panel.locator("summary").click()
    panel.locator(".values td").first.wait_for()
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    numbers = "rows => rows.map(row => [...row.cells].map(cell => Number(cell.innerText)))"
    cells = panel.locator(".values tbody tr").evaluate_all(numbers)
    assert [row[0] for row in cells] == [row["step"] for row in metrics]
    assert [row[1] for row in cells] == pytest.approx([row["reward"] for row in metrics], rel=1e-5)
    page.locator("details.others > summary").click()
    page.get_by_role("region", name="odd/one", exact=True).wait_for()
    assert page.get_by_role("region", name="Gradient's norm").count() == 0, "it has no number in any step"
    plot = panel.locator(".u-over").bounding_box()
    page.mouse.move(plot["x"] + plot["width"] * 0.5, plot["y"] + 40)
    page.mouse.down()
    page.mouse.move(plot["x"] + plot["width"] * 0.9, plot["y"] + 40, steps=5)
    page.mouse.up()
    page.wait_for_timeout(300)
    page.mouse.move(plot["x"] + 2, plot["y"] + 40)
    page.wait_for_timeout(100)
    step = int(panel.locator(".u-legend .u-value").first.inner_text())
    assert step > 8, "the first step in sight, after a zoom to the right half"
    page.mouse.click(plot["x"] + 2, plot["y"] + 40)
    page.get_by_role("tab", name="Samples", selected=True).wait_for()
    assert count(page) == 6


def test_it_is_worked_by_keys_alone(run: Path, open_page: Open) -> None:
    page = open_page(written(run))
    page.get_by_role("tab", name="Overview").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert page.get_by_role("tab", name="Samples").get_attribute("aria-selected") == "true"
    page.locator("[data-group]").nth(2).focus()
    page.keyboard.press("Enter")
    page.locator(".card").first.wait_for()
    page.get_by_label("colour tokens by").select_option("logprob")
    page.locator(".tokens").first.focus()
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    assert about(page)["place"] == "3 of 12"
    page.keyboard.press("ArrowLeft")
    assert about(page)["place"] == "2 of 12"


def light_of(page: Any, selector: str) -> float:
    colour = page.locator(selector).first.evaluate("node => getComputedStyle(node).color")
    return sum(map(float, colour.split("(")[1].rstrip(")").split(",")[:3]))


@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("dark", [False, True])
def test_it_fits_and_can_be_read(width: int, dark: bool, run: Path, open_page: Open) -> None:
    page = open_page(written(run), width=width, dark=dark)
    for name in ("Overview", "Curves", "Samples", "Evaluations", "Settings"):
        tab(page, name)
        page.wait_for_timeout(100)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, name
    assert (light_of(page, "h1") > 380) == dark
    page.get_by_role("button", name="light / dark").click()
    assert (light_of(page, "h1") > 380) != dark
    unnamed = page.evaluate(
        "[...document.querySelectorAll('button, input, select')].filter(n => !n.closest('[hidden]') && "
        "!(n.textContent.trim() || n.ariaLabel || n.closest('label')?.textContent.trim())).map(n => n.outerHTML)"
    )
    assert unnamed == []


@pytest.fixture
def server(run: Path) -> Iterator[LiveServer]:
    (run / "summary.json").unlink()
    (run / ".lock.1").write_text("{}")
    with LiveServer([run], host="127.0.0.1", port=0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_the_live_page_gains_steps_by_itself(server: LiveServer, run: Path, open_page: Open) -> None:
    page = open_page(server.url)
    steps = page.locator(".tile").nth(1)
    assert steps.inner_text().startswith("20 of 20")
    add_step(run, 21, groups=6)
    page.locator(".tile", has_text="21 of 20").wait_for()
    show(page, 21, 121)
    rows = [row for row in read_trajectories(run, [21]) if row.group == 121]
    assert page.locator(".card").count() == len(rows)
    (run / "trajectories/step_000021.jsonl").unlink()
    kept = (run / "metrics.jsonl").read_text().splitlines(keepends=True)[:20]
    (run / "metrics.jsonl").write_text("".join(kept))
    tab(page, "Overview")
    page.locator(".tile", has_text="20 of 20").wait_for()
    add_step(run, 21, groups=6)
    page.locator(".tile", has_text="21 of 20").wait_for()


def test_the_live_page_asks_the_run(server: LiveServer, run: Path, open_page: Open) -> None:
    page = open_page(server.url)
    page.on("dialog", lambda dialog: dialog.accept())
    for name in ("save", "stop"):
        page.locator(f"[data-wish={name}]").click()
        page.locator(f"[data-wish={name}]", has_text="asked").wait_for()
        assert (run / FILES[name]).exists()


@pytest.mark.alone
def test_a_page_of_500_steps_opens_at_once(tmp_path: Path, tokenizer: Path, browser: Any, open_page: Open) -> None:
    run = make_run(tmp_path / "run", steps=500, groups=32, samples=8, tokens=100, rows=1319)
    (run / "final").mkdir()
    shutil.copy(tokenizer, run / "final")
    started = time.perf_counter()
    report = write_report([run], run / "report.html")
    assert time.perf_counter() - started < 20
    assert report.size < 8e6
    assert report.groups == 16_000
    started = time.perf_counter()
    page = open_page(report.path.absolute().as_uri())
    assert time.perf_counter() - started < 2
    for name in ("Curves", "Samples", "Evaluations", "Settings"):
        tab(page, name)
        page.wait_for_timeout(200)
    tab(page, "Curves")
    page.get_by_label("step; 0: all").fill("0")
    page.get_by_text("Rewards: 128,000 samples").wait_for()
    tab(page, "Samples")
    page.get_by_placeholder("in prompts and answers").fill("answer 3 of step 500")
    page.wait_for_timeout(3000)
    session = page.context.new_cdp_session(page)
    session.send("HeapProfiler.collectGarbage")
    session.send("Performance.enable")
    numbers = {one["name"]: one["value"] for one in session.send("Performance.getMetrics")["metrics"]}
    assert numbers["JSHeapUsedSize"] < 300e6
