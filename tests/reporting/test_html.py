import json
import re
from html.parser import HTMLParser

import matplotlib
import pytest
from jinja2 import UndefinedError

from vbdcompress.reporting.html import hide_folder, render_html

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>$x$ ${{7*7}}"


class Page(HTMLParser):
    """Every tag with its attributes, and the text, as the standard library reads the page."""

    def __init__(self, source):
        super().__init__()
        self.tags, self.texts = [], []
        self.feed(source)
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.texts.append(data)

    def charts(self):
        return [attrs["data-chart"] for tag, attrs in self.tags if tag == "svg"]


def poison(value):
    """The same JSON with HOSTILE behind every text that a user's names can reach."""
    free = {"name", "kind", "reason", "explanation", "whole_because", "platform", "source", "architecture"}
    if isinstance(value, dict):
        return {
            key: f"{item}{HOSTILE}" if key in free and isinstance(item, str) else poison(item)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [f"{item}{HOSTILE}" if isinstance(item, str) else poison(item) for item in value]
    return value


def test_render_html_shows_what_a_reader_came_for(report):
    text = Page(render_html(report)).text
    for fact in (
        "87.5\N{MULTIPLICATION SIGN} fewer nonzero parameters",
        "71,850 → 821",
        "292 kB → 112 kB",
        "test error 0.89% → 1.34%",
        "onnxruntime equals torch to 3e-7 of the largest output (allowed 1e-4), batches of 1 and 7.",
        "MACs of aten.native_batch_norm are not counted.",
        "threshold 3, the default of this mode",
        "1,213 training, 135 validation and 449 test examples",
        "local reparameterisation",
        "no weight matrix",
        "torch 2.15.0",
        "lr log sigma2 0.003",
        "opset 20",
    ):
        assert fact in text, fact


def test_render_html_draws_every_chart(report):
    charts = Page(render_html(report)).charts()
    assert charts[:6] == ["curve0", "bars-nonzeros", "bars-macs", "latency", "objective", "error"]
    assert charts[6:] == ["alpha0-0", "alpha0-1", "alpha0-2", "alpha0-3"]


def test_render_html_is_self_contained(large_page):
    source, page = large_page, Page(large_page)
    assert not {"script", "iframe", "object", "embed", "base"} & {tag for tag, _ in page.tags}
    addresses = [attrs[name] for _, attrs in page.tags for name in ("src", "href", "srcset") if name in attrs]
    assert addresses
    assert all(address == "data:," or address.startswith("#") for address in addresses)
    assert set(re.findall(r"url\((.)", source)) == {"#"}
    assert "@import" not in source
    assert "http:" not in source
    assert "https:" not in source


def test_render_html_is_small(report, large_page):
    assert len(render_html(report).encode()) < 100_000
    assert len(large_page.encode()) < 400_000


def test_render_html_has_unique_ids_and_no_dead_references(large_page):
    ids = re.findall(r'\sid="([^"]*)"', large_page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="|url\()#([\w-]+)', large_page)) <= set(ids)


def test_render_html_escapes_hostile_names(large_report):
    source = render_html(poison(large_report))
    page = Page(source)
    assert not {"script", "img"} & {tag for tag, _ in page.tags}
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")]
    assert "&lt;script&gt;alert(1)" in source
    assert "49" not in re.findall(r"\$\{?\{?(\d+)", source)


def test_render_html_is_deterministic(report):
    assert render_html(report) == render_html(json.loads(json.dumps(report)))


def test_render_html_leaves_matplotlib_as_it_was(report):
    with matplotlib.rc_context({"font.size": 23.0, "svg.hashsalt": "mine"}):
        before = dict(matplotlib.rcParams)
        render_html(report)
        assert dict(matplotlib.rcParams) == before


def test_render_html_ignores_the_users_matplotlib_settings(report):
    plain = render_html(report)
    with matplotlib.rc_context({"axes.facecolor": "red", "font.size": 23.0, "axes.labelpad": 30.0}):
        assert render_html(report) == plain


def test_render_html_without_test_set_says_so(report):
    report["errors"]["test"] = None
    report["error_split"], report["error"] = "validation", 1.48
    report["data"].update(test=None, validation_held_out=None)
    text = Page(render_html(report)).text
    assert "validation error 0.74% → 1.48%" in text
    assert "and no test set" in text
    assert "Whether the original was trained on the validation examples is not known" in text
    assert "Test error" not in text
    assert "None" not in text.replace("session.run(None", "")


def test_render_html_of_a_bare_report(report):
    report.update(source=None, architecture=None, seed=None, seconds=None, data=None, errors=None)
    report.update(error=None, error_split=None, export=None, latency=[], files=[], finetune=[], stages=[])
    report.update(warnings=[], uncounted_ops=[], layers=[], config={})
    report["input"].update(mean=[], std=[])
    page = Page(render_html(report))
    assert page.charts() == []
    assert "None" not in page.text
    assert "Not trained." in page.text


def test_render_html_with_one_epoch_and_an_empty_curve(report):
    stage = report["stages"][0]
    stage.update(epochs=stage["epochs"][:1], curve=[], groups=[])
    stage["epochs"][0].update(error=None, sparsity=None)
    stage["log_alpha"]["layers"] = []
    stage["selection"]["threshold"] = None
    report["finetune"] = []
    page = Page(render_html(report))
    assert page.charts() == ["bars-nonzeros", "bars-macs", "latency", "objective"]
    assert "No curve was measured." in page.text


def test_render_html_says_where_an_unmeasured_threshold_is_drawn(report):
    report["stages"][0]["selection"]["threshold"] = 2.7
    assert "chosen (threshold 2.7; drawn at 3)" in Page(render_html(report)).text


def test_render_html_counts_the_points_outside_the_picture(report):
    text = Page(render_html(report)).text
    (count, top) = re.search(r"(\d+) points lie above ([\d.]+)% and outside", text).groups()
    errors = [point["error"] for point in report["stages"][0]["curve"]]
    assert int(count) == sum(error > float(top) + 0.005 for error in errors) > 0


@pytest.mark.parametrize("field", ["bytes", "parameters"])
def test_render_html_lists_the_size_that_the_budget_bounds(report, field):
    assert f">{field.capitalize()}</th>" not in points_of_the_curve(render_html(report))
    stage = report["stages"][0]
    stage["selection"]["limits"] = {field: 1}
    for number, point in enumerate(stage["curve"]):
        point["size"][field] = 700_001 + number
    table = points_of_the_curve(render_html(report))
    assert f">{field.capitalize()}</th>" in table
    assert "700,001" in table


def points_of_the_curve(page: str) -> str:
    return page.partition("Points of the curve")[2].partition("</table>")[0]


def test_render_html_caps_the_bars_and_says_so(large_report, large_page):
    source = large_page
    bars = source[source.index('data-chart="bars-macs"') :]
    assert len(re.findall(r">backbone\.[^<]*<", bars[: bars.index("</svg>")])) == 60
    assert Page(source).text.count("The 60 largest of 152 layers; the table below has all.") == 2
    assert all(f'<td class="name">{layer["name"]}</td>' in source for layer in large_report["layers"])


def test_render_html_folds_long_tables_only(report, large_page):
    assert [attrs for tag, attrs in Page(render_html(report)).tags if tag == "details"] == [
        {"open": None}
    ] * 2
    assert [attrs for tag, attrs in Page(large_page).tags if tag == "details"] == [{}] * 4


def test_render_html_shows_a_layer_that_lost_everything(report):
    report["layers"][0]["after"].update(parameters=0, nonzeros=0, macs=0, shape=[])
    assert "gone" in Page(render_html(report)).texts


def test_render_html_draws_names_that_matplotlib_would_interpret(report):
    report["layers"][0]["name"] = "a$b_{$層\\frac"
    assert "a$b_{$層\\frac" in Page(render_html(report)).texts


def test_render_html_marks_a_file_that_differs(report):
    report["export"]["max_difference"] = 0.2
    source = render_html(report)
    assert "onnxruntime differs from torch" in source
    assert 'class="status good"' not in source


def test_render_html_refuses_a_report_with_a_missing_field(report):
    del report["environment"]["cpu_count"]
    with pytest.raises(UndefinedError, match="cpu_count"):
        render_html(report)


@pytest.mark.parametrize(
    ("path", "shown"),
    [("/home/ann/net.pt", "net.pt"), ("C:\\Users\\ann\\net.pt", "net.pt"), ("zoo/net.pt", "zoo/net.pt")],
)
def test_hide_folder_keeps_relative_paths_only(path, shown):
    assert hide_folder(path) == shown


def test_render_html_lists_what_the_file_takes(report):
    report["inputs"] = [
        {"name": "ids", "shape": [5, 16], "dtype": "int64", "any_size": [1]},
        {"name": "scale", "shape": [], "dtype": "float32"},
    ]
    told = " ".join(Page(render_html(report)).text.split("\N{MULTIPLICATION SIGN}"))
    assert "ids , int64, batch any 16 scale , float32, batch batch any size" in told
    report["export"]["outputs"] = [
        {"name": "cls", "shape": ["batch", 10], "dtype": "float32"},
        {"name": "length", "shape": [], "dtype": "int64"},
    ]
    told = " ".join(Page(render_html(report)).text.split("\N{MULTIPLICATION SIGN}"))
    assert "any size output cls , float32, batch 10 length , int64 scaling" in told
    assert 'outputs = dict(zip(["cls", "length"], session.run(None, {"ids": x0, "scale": x1})))' in told
    report["input"]["embedded"] = True
    report["inputs"] = [{"name": "input", "shape": [8, 6], "dtype": "uint8"}]
    told = " ".join(Page(render_html(report)).text.split("\N{MULTIPLICATION SIGN}"))
    assert "input , uint8, batch 8 6 batch any size" in told
    assert "scaling none: pixels from 0 to 255" in told


def test_render_html_says_how_the_weights_are_stored(report):
    assert "How the weights are stored" not in Page(render_html(report)).text
    layer = {"name": "fc1.weight", "kind": "codebook", "bits": 4, "error_over_sigma": 0.4321}
    report["rounding"] = {"layers": [layer], "validation_error": {"before": 1.5, "after": 1.6}}
    report["export"]["packed"] = [
        {"name": "fc1.weight", "kind": "gaps and codebook of 16", "dense_bytes": 250_000, "bytes": 3_400}
    ]
    text = Page(render_html(report)).text
    for fact in (
        "How the weights are stored",
        "validation error 1.50% before, 1.60% after",
        "fc1.weight codebook 4 0.43",
        "fc1.weight gaps and codebook of 16 250 kB 3.40 kB",
    ):
        assert fact in text, fact
