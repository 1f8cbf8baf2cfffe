// A click on a heading of a table sorts the table. Without script nothing is missing.
document.querySelectorAll("table.sortable").forEach(function (table) {
  var body = table.tBodies[0];
  table.querySelectorAll("thead th").forEach(function (heading, column) {
    var button = heading.querySelector("button");
    if (!button) return;
    button.addEventListener("click", function () {
      var falling = heading.getAttribute("aria-sort") === "descending" ? false
        : heading.getAttribute("aria-sort") === "ascending" ? true : heading.classList.contains("number");
      table.querySelectorAll("thead th").forEach(function (other) { other.removeAttribute("aria-sort"); });
      heading.setAttribute("aria-sort", falling ? "descending" : "ascending");
      var key = function (row) {
        var cell = row.cells[column], given = cell.getAttribute("data-key"), text = cell.textContent.trim();
        if (given !== null) return given === "" ? -Infinity : Number(given);
        if (!heading.classList.contains("number")) return text;
        var shown = parseFloat(text.replace(/,/g, ""));
        return isNaN(shown) ? -Infinity : shown;
      };
      Array.from(body.rows).sort(function (a, b) {
        var x = key(a), y = key(b);
        var order = typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y));
        return falling ? -order : order;
      }).forEach(function (row) { body.appendChild(row); });
    });
  });
});
