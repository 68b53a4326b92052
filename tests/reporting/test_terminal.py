import io

from rich.console import Console

from vbdcompress.reporting.terminal import print_summary


def show(report, width=80, encoding="utf-8"):
    buffer = io.BytesIO()
    stream = io.TextIOWrapper(buffer, encoding=encoding)
    print_summary(report, Console(file=stream, width=width))
    stream.flush()
    return buffer.getvalue().decode(encoding)


def line_of(text, label):
    (line,) = [line for line in text.splitlines() if line.lstrip(" |").startswith(label)]
    return line


def test_print_summary_shows_before_after_and_change(report):
    text = show(report)
    for label, cells in {
        "nonzero parameters": ("71,850", "821", "87.5\N{MULTIPLICATION SIGN} fewer"),
        "parameters": ("71,850", "26,830", "2.7\N{MULTIPLICATION SIGN} fewer"),
        "MACs of one example": ("149,760", "81,834", "1.83\N{MULTIPLICATION SIGN} fewer"),
        "ONNX file": ("292 kB", "112 kB", "2.6\N{MULTIPLICATION SIGN} smaller"),
        "test error": ("0.89%", "1.34%", "+0.45 points"),
        "validation error": ("0.74%", "1.48%", "+0.74 points"),
        "latency, batch 1 ": ("0.0312 ms", "0.0187 ms", "1.67\N{MULTIPLICATION SIGN} faster"),
        "latency, batch 64": ("1.21 ms", "0.402 ms", "3.0\N{MULTIPLICATION SIGN} faster"),
    }.items():
        assert all(cell in line_of(text, label) for cell in cells), label
    assert "onnxruntime equals torch to 3e-7 (allowed 1e-4), batches of 1 and 7" in text
    assert "warning: MACs of aten.native_batch_norm are not counted." in text


def test_print_summary_fits_eighty_columns(large_report):
    text = show(large_report)
    assert max(len(line) for line in text.splitlines()) <= 80
    # not by breaking a row in two
    row = line_of(text, "MACs of one example")
    assert all(cell in row for cell in ("4,245,792,768", "707,582,736", "6.0\N{MULTIPLICATION SIGN} fewer"))


def test_print_summary_says_when_the_file_differs(report):
    report["export"]["max_difference"] = 0.2
    assert "onnxruntime DIFFERS from torch to 2e-1 (allowed 1e-4)" in show(report)


def test_print_summary_says_when_slim_is_slower(report):
    report["latency"][0]["slim_ms"] = 0.0624
    assert "2.0\N{MULTIPLICATION SIGN} slower" in line_of(show(report), "latency, batch 1 ")


def test_print_summary_without_test_set_shows_validation_only(report):
    report["errors"]["test"] = None
    text = show(report)
    assert "test error" not in text
    assert "None" not in text
    assert "validation error" in text


def test_print_summary_without_export_errors_or_stages(report):
    report.update(export=None, latency=[], errors=None, stages=[], warnings=[])
    text = show(report)
    assert "onnxruntime" not in text
    assert "nonzero parameters" in text


def test_print_summary_takes_names_literally(report):
    report["name"] = "[red]net[/red]"
    report["warnings"] = ["layer [bold]x[/bold] was left"]
    text = show(report)
    assert "[red]net[/red]" in text
    assert "layer [bold]x[/bold] was left" in text


def test_print_summary_writes_ascii_where_nothing_else_fits(report):
    report["name"] = "größe"
    report["warnings"] = ["µ is left"]
    text = show(report, encoding="ascii")
    assert "87.5x fewer" in text
    assert "? is left" in text


def test_print_summary_calls_a_tempered_elbo_what_it_is(report):
    report["stages"][0]["beta"] = 1.0
    assert "tempered" not in show(report)
    report["stages"][0]["beta"] = 4.0
    assert "tempered ELBO, beta 4" in " ".join(show(report).split())


def test_print_summary_says_what_rounding_did(report):
    layers = [
        {"name": name, "kind": "int8", "bits": bits, "error_over_sigma": None}
        for name, bits in (("a", 4), ("b", 16))
    ]
    report["rounding"] = {"layers": layers, "validation_error": {"before": 1.5, "after": 1.6}}
    assert "weights in 4 to 16 bits: validation error 1.50% before, 1.60% after" in show(report)
    report["rounding"]["layers"] = []
    assert "no weight was rounded" in show(report)
