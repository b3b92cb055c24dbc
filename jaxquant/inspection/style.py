"""Style and script of pages; they are part of the page, so that it needs no other file."""

CSS = """
:root { color-scheme: light dark; --line: #8884; --accent: #3b6fd4; --second: #d98c3b }
* { box-sizing: border-box }
body { font: 15px/1.45 system-ui, sans-serif; margin: 0 auto; max-width: 1200px; padding: 16px }
h1 { font-size: 1.4rem; overflow-wrap: anywhere }
h2 { font-size: 1.1rem; margin-top: 2rem }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(160px, 1fr)); gap: 12px }
dl div { border: 1px solid var(--line); border-radius: 8px; padding: 8px 12px }
dt { opacity: .75; font-size: .85rem }
dd { margin: 0; font-size: 1.15rem; font-weight: 600 }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 8px }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th, td { padding: 5px 10px; text-align: left; white-space: nowrap }
td { border-top: 1px solid var(--line); vertical-align: top }
td.note { white-space: normal; min-width: 10em }
td.name { max-width: 28em; white-space: normal; overflow-wrap: anywhere; min-width: 12em }
.number { text-align: right }
th button { all: unset; cursor: pointer; font-weight: 600 }
th button:focus-visible { outline: 2px solid var(--accent) }
th[aria-sort=ascending] button::after { content: " \\2191" }
th[aria-sort=descending] button::after { content: " \\2193" }
td svg.columns { width: 90px; height: 20px }
svg { display: block; width: 100%; height: 100% }
svg.columns { height: 90px }
rect { fill: var(--accent) }
rect.bits { fill: var(--second) }
.bar { display: grid; gap: 2px 8px; align-items: center; padding: 2px 0;
  grid-template-columns: minmax(0, 3fr) 2fr 90px 1fr 80px }
.bar .name { overflow-wrap: anywhere }
.bar span + svg, .bar svg { height: 10px }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(230px, 1fr)); gap: 16px }
figure { margin: 0 }
figcaption { font-size: .85rem; border-top: 1px solid var(--line); padding-top: 2px }
@media (max-width: 600px) {
  .bar { grid-template-columns: 1fr 90px; padding: 6px 0 }
  .bar .name { grid-column: 1 / -1 }
  td.name { min-width: 11em }
}
"""

# A click sorts the rows by the column's values; a second one in the other order.
SCRIPT = """
document.querySelectorAll("th button").forEach(function (button) {
  button.addEventListener("click", function () {
    var head = button.parentNode, table = head.closest("table"), body = table.tBodies[0];
    var is_up = head.getAttribute("aria-sort") !== "ascending";
    var is_number = head.className === "number";
    table.querySelectorAll("th").forEach(function (h) { h.removeAttribute("aria-sort"); });
    head.setAttribute("aria-sort", is_up ? "ascending" : "descending");
    Array.from(body.rows).sort(function (a, b) {
      var x = a.cells[head.cellIndex].dataset.value, y = b.cells[head.cellIndex].dataset.value;
      return (is_number ? x - y : x < y ? -1 : x > y ? 1 : 0) * (is_up ? 1 : -1);
    }).forEach(function (row) { body.appendChild(row); });
  });
});
"""
