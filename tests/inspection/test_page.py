"""Pages of `jaxquant inspect --html`: parsed, and compared with the report."""

import dataclasses
import html.parser
import math
import re

import jax
import jax.numpy as jnp
import pytest

import jaxquant as jq
from jaxquant import checkpoints, inspection
from jaxquant.__main__ import main
from jaxquant.inspection import charts, page, rows
from jaxquant.tree.internal import sqnr_metadata

from ..checkpoints.gguf_files import gguf
from ..tree.trees import normal

# Code of a type of GGUF.
Q8_0 = 8
VOID = {"meta"}
HOSTILE = "\"'</script><img src=https://example.com/x onerror='alert(1)'>&\u202e"


class Page(html.parser.HTMLParser):
    """Elements, texts and the cells of the table; it is an error if tags do not match."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.cells, self.texts = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag == "tr":
            self.cells.append([])
        if tag == "td":
            self.cells[-1].append(["", dict(attrs)["data-value"]])
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append((("", *self.open), data))
        if "td" in self.open and "title" not in self.open:
            self.cells[-1][-1][0] += data

    def named(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def model():
    params = {
        "up": normal(256, 64),
        "down": normal(64, 32, seed=1),
        "bias": jnp.ones(64),
        HOSTILE: normal(64, 8, seed=2),
    }
    rules = {"up": jq.W4A16, "down": jq.W8A8, "*img*": jq.NF4A16}
    return params, jq.tree.quantize(params, rules)


@pytest.fixture
def parsed(tmp_path, capsys):
    """The page about that model, and its report."""
    params, quantized = model()
    report = jq.tree.report(params, quantized)
    jq.save(tmp_path / "a&b.safetensors", quantized, sqnr_metadata(report))
    arguments = ["inspect", str(tmp_path / "a&b.safetensors"), "--html", str(tmp_path / "p.html")]
    assert main(arguments) == 0
    capsys.readouterr()
    text = (tmp_path / "p.html").read_text()
    return Page(text), report


def test_the_table_says_what_the_report_says(parsed):
    found, report = parsed
    head, *lines = found.cells
    assert not head
    assert len(lines) == len(report.rows) == 4
    for line, row in zip(lines, report.rows, strict=True):
        texts = [text for text, _ in line]
        assert texts[0] == row.path
        assert texts[1] == "x".join(map(str, row.shape))
        assert texts[5] == f"{row.bits_per_weight:.2f}"
        assert texts[6] == f"{row.bytes_after:,}"
        assert texts[7] == ("" if row.sqnr is None else f"{row.sqnr:.1f}")
        words = [text for text in texts[2:5] if text]
        assert " ".join(words) == (row.scheme or "float32").replace(",", "")
        assert texts[9] == (row.warning or row.reason or "")
        assert line[8][1] == str(sum(count > 0 for count in row.codes))


def test_columns_are_sorted_by_values_that_are_numbers(parsed):
    found, _ = parsed
    numbers = [i for i, a in enumerate(found.named("th")) if a.get("class") == "number"]
    assert numbers == [1, 5, 6, 7, 8]
    for line in found.cells[1:]:
        assert all(math.isfinite(float(line[i][1])) for i in numbers)
    assert len(found.named("button")) == len(found.named("th")) == len(found.cells[1])


def test_totals_are_those_of_the_report(parsed):
    found, report = parsed
    names = [text for tags, text in found.texts if tags[-1] == "dt"]
    values = [text for tags, text in found.texts if tags[-1] == "dd"]
    totals = dict(zip(names, values, strict=True))
    total = report.total
    assert totals["tensors"] == "4"
    assert totals["quantized"] == "3"
    assert totals["weights"] == f"{total.shape[0]:,}"
    assert totals["bits per weight"] == f"{total.bits_per_weight:.2f}"
    assert totals["in memory"] == charts.megabytes(total.bytes_after)
    assert totals["before quantization"] == charts.megabytes(total.bytes_before)


def test_the_page_loads_nothing_and_names_are_text(parsed):
    found, _ = parsed
    kinds = {tag for tag, _ in found.elements}
    assert not kinds & {"img", "link", "iframe", "object", "use", "image", "a"}
    assert len(found.named("script")) == 1
    attributes = {name for _, a in found.elements for name in a}
    assert not attributes & {"src", "href", "onclick", "onerror"}
    policy = found.named("meta")[1]["content"]
    assert policy.startswith("default-src 'none'")
    style = next(text for tags, text in found.texts if tags[-1] == "style")
    assert not re.search(r"url\(|@import", style)
    names = [text for tags, text in found.texts if tags[-1] == "bdi"]
    assert names.count(HOSTILE) == 2
    assert names[0] == "a&b.safetensors"


def test_charts_show_each_tensor_and_each_format(parsed):
    found, _ = parsed
    assert sum(a.get("class") == "bar" for a in found.named("div")) == 4
    captions = "".join(t for tags, t in found.texts if "figcaption" in tags)
    for kind in ("int4 g128", "int8 per channel", "nf4 per channel"):
        assert f"{kind}: codes" in captions
        assert f"{kind}: scales" in captions


def test_few_tensors_of_many_have_bars():
    row = rows.InspectedTensor("a", (8,), "float32", "", "", 32.0, 32, 32, None, "")
    text = charts.bars([row] * (charts.MAX_BARS + 10))
    assert text.count('class="bar"') == charts.MAX_BARS
    assert "The 10 smaller tensors are only in the table." in text
    assert charts.bars([]) == ""


def test_bars_show_the_largest_first_and_have_lengths_in_proportion():
    small = rows.InspectedTensor("small", (8,), "float32", "", "", 32.0, 32, 32, None, "")
    large = rows.InspectedTensor("large", (512,), "int8", "", "", 8.0, 512, 2048, None, "")
    text = charts.bars([small, large])
    assert re.findall("<bdi>(.*?)</bdi>", text) == ["large", "small"]
    assert re.findall(r'class="bytes" width="([\d.]+)"', text) == ["100.00", "6.25"]
    assert re.findall(r'class="bits" width="([\d.]+)"', text) == ["25.00", "100.00"]


def test_bars_of_more_than_32_bits_are_as_long_as_those_of_32():
    bits = (160.0, 32.0, 8.0)
    of_bits = [rows.InspectedTensor("a", (), "", "", "", b, 8, 8, None, "") for b in bits]
    text = charts.bars(of_bits)
    assert re.findall(r'class="bits" width="([\d.]+)"', text) == ["100.00", "100.00", "25.00"]


def test_histograms_add_the_tensors_of_one_format():
    def row(format, codes, scales):
        return rows.InspectedTensor(
            "a", (4,), format, "g2", "", 4.0, 2, 16, None, "", codes, scales
        )

    text = charts.histograms(
        [row("int4", (1, 3), {0: 1}), row("nf4", (0, 4), {}), row("int4", (2, 0), {0: 1, 2: 4})]
    )
    figures = [found.split("<figcaption>") for found in text.split("<figure>")[1:]]
    heights = [[float(h) for h in re.findall(r' height="([\d.]+)"', f)] for f, _ in figures]
    assert heights == [[40, 40], [20, 0, 40], [0, 40]]
    assert "int4 g2: scales, from 2<sup>0</sup> to 2<sup>3</sup>" in figures[1][1]


def test_columns_have_heights_in_proportion():
    heights = [float(h) for h in re.findall(r' height="([\d.]+)"', charts.columns([1, 4, 0]))]
    assert heights == [10, 40, 0]
    assert "<title>20.00%</title>" in charts.columns([1, 4, 0])
    assert charts.columns([0]).count("<rect") == 1


def test_exponents_of_scales_are_counted():
    q = jq.quantize(
        jnp.diag(jnp.array([127.0, 4 * 127.0, 5 * 127.0, 0.25 * 127.0])), jq.ArrayConfig(), 0
    )
    assert rows.scale_exponents(q) == {-2: 1, 0: 1, 2: 2}
    nested = jq.quantize(normal(32, 8), jq.ArrayConfig(format=jq.NVFP4, group_size=16), 0)
    assert sum(rows.scale_exponents(nested).values()) == 16


@pytest.mark.parametrize(
    "value, place", [(None, -1e9), (math.nan, -1e9), (math.inf, 1e8), (3.0, 3.0)]
)
def test_an_unknown_error_is_sorted_below_all(value, place):
    assert page._sortable(value) == place


def test_adapters_are_in_the_note(tmp_path):
    params = {"w": normal(256, 32)}
    rules = {"w": jq.W4A8}
    adapted = jq.training.lora_init(params, rules, rank=3, key=jax.random.key(0))
    jq.save(tmp_path / "a", adapted)
    (row,) = inspection.read(tmp_path / "a").rows()
    assert (row.format, row.inputs) == ("int4", "int8 inputs")
    assert row.note == "adapters of rank 3"
    assert sum(row.scales.values()) == adapted["w"].base.scale.size
    bare = jq.training.lora_init(params, {"w": jq.W8A16}, rank=3, key=jax.random.key(0))
    jq.save(tmp_path / "b", bare)
    (row,) = inspection.read(tmp_path / "b").rows()
    assert (row.format, row.granularity, row.inputs) == ("int8", "per channel", "")


def test_scales_without_an_exponent_are_not_counted():
    q = jq.quantize(normal(2, 6), jq.ArrayConfig(), axis=0)
    scale = jnp.array([[0.0, jnp.nan, jnp.inf, 3.0, 5.0, 7.0]])
    assert rows.scale_exponents(dataclasses.replace(q, scale=scale)) == {1: 1, 2: 2}


@pytest.mark.parametrize(
    ("note", "wanted"), [("", "stored as Q4_K"), ("rounded", "stored as Q4_K; rounded")]
)
def test_the_note_says_how_a_tensor_is_stored_and_what_differs(note, wanted):
    row = checkpoints.CheckpointRow("a", (4, 2), "Q4_K", "int4 g32", 4.5, 5, 6, True, note)
    assert rows.of_checkpoint(row).note == wanted


def test_files_of_others_have_pages(tmp_path, capsys):
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf([], [("a.weight", (4, 32), Q8_0, bytes(4 * 34))]))
    assert main(["inspect", str(path), "--html", str(tmp_path / "p.html")]) == 0
    found = Page((tmp_path / "p.html").read_text())
    (line,) = found.cells[1:]
    assert line[0][0] == "a.weight"
    assert "stored as Q8_0" in line[9][0]
    assert not found.named("figure")
    assert any(text == "in the file" for _, text in found.texts)


def test_names_that_are_not_unicode_have_pages(tmp_path):
    jq.save(tmp_path / "a", {"\ud800": jnp.ones(2)})
    inspection.write_page(tmp_path / "p.html", inspection.read(tmp_path / "a"))
    assert "\\ud800" in (tmp_path / "p.html").read_text()
