"use strict";
// Tables sorted by a touch on their heads and filtered by words; the setting of a point where it is touched; what a link
// points at is unfolded. The page reads without any of it.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const button = document.createElement("button");
    button.textContent = head.textContent;
    head.replaceChildren(button);
    button.onclick = () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const value = (row) => row.cells[column].dataset.v ?? row.cells[column].textContent;
      const compare = (a, b) => {
        const [x, y] = [value(a), value(b)];
        if (x === "" || y === "") return (x === "") - (y === ""); // what is not known stands last
        const order = isNaN(x) || isNaN(y) ? x.localeCompare(y, "en", { numeric: true }) : x - y;
        return up ? order : -order;
      };
      body.append(...[...body.rows].sort(compare));
    };
  });
  const filter = document.createElement("input");
  filter.type = "search";
  filter.className = "filter";
  filter.placeholder = "show lines with these words";
  filter.setAttribute("aria-label", filter.placeholder);
  filter.oninput = () => {
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    for (const row of body.rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
    }
  };
  table.parentElement.before(filter);
}
const tip = document.createElement("div");
tip.className = "tip";
document.addEventListener("click", (event) => {
  const point = event.target.closest(".drawing circle");
  tip.remove();
  if (!point) return;
  const drawing = point.closest(".drawing"), box = drawing.getBoundingClientRect(), at = point.getBoundingClientRect();
  tip.textContent = point.querySelector("title").textContent;
  tip.style.left = `${Math.max(0, Math.min(at.left - box.left, box.width - 320))}px`;
  tip.style.top = `${at.bottom - box.top + 4}px`;
  drawing.append(tip);
});
const unfold = () => {
  const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  for (let at = target; at; at = at.parentElement) if (at.tagName === "DETAILS") at.open = true;
  if (target) target.scrollIntoView();
};
addEventListener("hashchange", unfold);
if (location.hash) unfold();
