// Curves that zoom, a legend that hides runs, and a page that follows a sweep. Without script nothing is missing.
(function () {
  var SIDE = 10000;

  function round(low, high, most) {
    var raw = (high - low) / Math.max(1, most - 1), power = Math.pow(10, Math.floor(Math.log10(raw))), found = [];
    var step = [1, 2, 5, 10].map(function (d) { return d * power; }).find(function (s) { return s >= raw * (1 - 1e-9); });
    for (var k = Math.ceil(low / step - 1e-9); k <= Math.floor(high / step + 1e-9); k++) found.push(Number((k * step).toPrecision(12)));
    return found;
  }
  function short(value) {
    var size = Math.abs(value);
    if (size >= 1e6) return Number((value / 1e6).toPrecision(4)) + "M";
    if (size >= 1e4) return Number((value / 1e3).toPrecision(4)) + "k";
    if (size && size < 1e-4) return value.toExponential(1).replace("e-0", "e-");
    return String(Number(value.toPrecision(4)));
  }
  function clamp(value, low, high) { return Math.min(high, Math.max(low, value)); }
  function make(name, className, parent) {
    var made = document.createElement(name);
    made.className = className;
    parent.appendChild(made);
    return made;
  }

  document.querySelectorAll(".plot.zoom").forEach(function (plot) {
    var area = plot.querySelector(".area"), inner = plot.querySelector("svg.lines");
    var grid = plot.querySelector(".grid-lines"), data = plot.dataset;
    var paths = Array.from(inner.querySelectorAll(".path"));
    var isLog = data.ylog === "1";
    var full = {
      x0: Number(data.x0), x1: Number(data.x1),
      y0: isLog ? Math.log10(Number(data.y0)) : Number(data.y0), y1: isLog ? Math.log10(Number(data.y1)) : Number(data.y1)
    };
    // What is seen, as shares of the whole: left, right, bottom, top.
    var seen = { l: 0, r: 1, b: 0, t: 1 };

    function valueX(share) { return full.x0 + share * (full.x1 - full.x0); }
    function valueY(share) { var v = full.y0 + share * (full.y1 - full.y0); return isLog ? Math.pow(10, v) : v; }

    function ticks(low, high, most) {
      if (!isLog || most !== 6) return round(low, high, most);
      var powers = [];
      for (var k = Math.ceil(Math.log10(low)); k <= Math.floor(Math.log10(high)); k++) powers.push(Math.pow(10, k));
      return powers.length > 1 ? powers : round(low, high, most);
    }
    function draw() {
      inner.setAttribute("viewBox", [seen.l * SIDE, (1 - seen.t) * SIDE, (seen.r - seen.l) * SIDE, (seen.t - seen.b) * SIDE].join(" "));
      area.querySelectorAll(".x-tick, .y-tick").forEach(function (old) { old.remove(); });
      grid.replaceChildren();
      ticks(valueX(seen.l), valueX(seen.r), area.clientWidth < 340 ? 4 : 7).forEach(function (value) {
        var share = (value - full.x0) / (full.x1 - full.x0);
        var tick = make("span", "x-tick", area);
        tick.textContent = short(value);
        tick.style.left = 100 * (share - seen.l) / (seen.r - seen.l) + "%";
      });
      ticks(valueY(seen.b), valueY(seen.t), 6).forEach(function (value) {
        var share = ((isLog ? Math.log10(value) : value) - full.y0) / (full.y1 - full.y0);
        var at = 100 - 100 * (share - seen.b) / (seen.t - seen.b) + "%";
        var tick = make("span", "y-tick", area), line = document.createElementNS("http://www.w3.org/2000/svg", "line");
        tick.textContent = short(value);
        tick.style.top = at;
        [["x1", "0"], ["x2", "100%"], ["y1", at], ["y2", at], ["class", "gridline"]].forEach(function (pair) { line.setAttribute(pair[0], pair[1]); });
        grid.appendChild(line);
      });
    }
    function show(l, r, b, t) {
      var width = clamp(r - l, 0.002, 1), height = clamp(t - b, 0.002, 1);
      seen.l = clamp(l, 0, 1 - width); seen.r = seen.l + width;
      seen.b = clamp(b, 0, 1 - height); seen.t = seen.b + height;
      draw();
    }
    function scale(factor) {
      var x = (seen.l + seen.r) / 2, y = (seen.b + seen.t) / 2;
      var w = (seen.r - seen.l) * factor / 2, h = (seen.t - seen.b) * factor / 2;
      show(x - w, x + w, y - h, y + h);
    }
    function move(x, y) {
      var dx = x * (seen.r - seen.l) / 4, dy = y * (seen.t - seen.b) / 4;
      show(seen.l + dx, seen.r + dx, seen.b + dy, seen.t + dy);
    }
    function all() { show(0, 1, 0, 1); }
    var actions = {
      "+": function () { scale(0.6); }, "=": function () { scale(0.6); }, "-": function () { scale(1 / 0.6); }, "0": all, "Escape": all,
      "ArrowLeft": function () { move(-1, 0); }, "ArrowRight": function () { move(1, 0); },
      "ArrowUp": function () { move(0, 1); }, "ArrowDown": function () { move(0, -1); }
    };

    plot.setAttribute("role", "group");
    plot.tabIndex = 0;
    plot.addEventListener("keydown", function (event) {
      if (event.target !== plot || event.ctrlKey || event.metaKey || event.altKey || !actions[event.key]) return;
      event.preventDefault();
      actions[event.key]();
    });
    var tools = document.createElement("div");
    tools.className = "tools";
    [["+", "Zoom in", "+"], ["−", "Zoom out", "-"], ["←", "Move left", "ArrowLeft"], ["→", "Move right", "ArrowRight"], ["⤢", "See all", "0"]].forEach(function (tool) {
      var button = make("button", "", tools);
      button.type = "button";
      button.textContent = tool[0];
      button.title = tool[1];
      button.setAttribute("aria-label", tool[1]);
      button.addEventListener("click", actions[tool[2]]);
    });
    plot.parentNode.insertBefore(tools, plot);

    // Dragging chooses what is seen; moving tells the nearest point.
    var start = null, chosen = null, told = null, here = null;
    function place(event) {
      var box = area.querySelector("svg").getBoundingClientRect();
      return { x: clamp((event.clientX - box.left) / box.width, 0, 1), y: clamp(1 - (event.clientY - box.top) / box.height, 0, 1), w: box.width, h: box.height };
    }
    function points(path) {
      if (!path.places) path.places = path.getAttribute("points").split(" ").map(function (pair) {
        var both = pair.split(",");
        return [both[0] / SIDE, 1 - both[1] / SIDE];
      });
      return path.places;
    }
    function forget() {
      [told, here].forEach(function (old) { if (old) old.remove(); });
      told = here = null;
    }
    function tell(at) {
      var best = null, least = 900;
      paths.forEach(function (path) {
        if (path.classList.contains("is-hidden")) return;
        points(path).forEach(function (point) {
          var x = (point[0] - seen.l) / (seen.r - seen.l), y = (point[1] - seen.b) / (seen.t - seen.b);
          var far = Math.pow((x - at.x) * at.w, 2) + Math.pow((y - at.y) * at.h, 2);
          if (far < least && x >= 0 && x <= 1 && y >= 0 && y <= 1) { least = far; best = { x: x, y: y, p: point, path: path }; }
        });
      });
      forget();
      paths.forEach(function (path) { path.classList.toggle("is-faint", best !== null && path !== best.path); });
      if (!best) return;
      here = make("span", "here", area);
      here.style.left = 100 * best.x + "%"; here.style.top = 100 * (1 - best.y) + "%";
      told = make("span", "told", area);
      told.textContent = best.path.dataset.name + ": " + short(valueY(best.p[1])) + " at step " + Math.round(valueX(best.p[0]));
      told.style[best.x > 0.5 ? "right" : "left"] = (best.x > 0.5 ? 100 - 100 * best.x : 100 * best.x) + "%";
      told.style[best.y > 0.5 ? "top" : "bottom"] = (best.y > 0.5 ? 100 * (1 - best.y) : 100 * best.y) + "%";
      told.style.margin = "10px";
    }
    area.addEventListener("pointerdown", function (event) {
      if (event.button !== 0 || event.pointerType === "touch") return;
      start = place(event);
      area.setPointerCapture(event.pointerId);
      event.preventDefault();
      plot.focus({ preventScroll: true });
    });
    area.addEventListener("pointermove", function (event) {
      var at = place(event);
      if (!start) { tell(at); return; }
      forget();
      if (!chosen) chosen = make("span", "chosen", area);
      chosen.style.left = 100 * Math.min(start.x, at.x) + "%"; chosen.style.width = 100 * Math.abs(at.x - start.x) + "%";
      chosen.style.top = 100 * (1 - Math.max(start.y, at.y)) + "%"; chosen.style.height = 100 * Math.abs(at.y - start.y) + "%";
    });
    function end(event) {
      if (!start) return;
      var at = place(event), from = start;
      start = null;
      if (chosen) { chosen.remove(); chosen = null; }
      if (event.type === "pointercancel" || Math.abs(at.x - from.x) * at.w < 8) return;
      var w = seen.r - seen.l, h = seen.t - seen.b, isFlat = Math.abs(at.y - from.y) * at.h < 12;
      show(seen.l + w * Math.min(at.x, from.x), seen.l + w * Math.max(at.x, from.x),
        isFlat ? seen.b : seen.b + h * Math.min(at.y, from.y), isFlat ? seen.t : seen.b + h * Math.max(at.y, from.y));
    }
    area.addEventListener("pointerup", end);
    area.addEventListener("pointercancel", end);
    area.addEventListener("pointerleave", function () {
      forget();
      paths.forEach(function (path) { path.classList.remove("is-faint"); });
    });
    area.addEventListener("dblclick", all);
  });

  document.querySelectorAll(".legend button").forEach(function (button) {
    button.addEventListener("click", function () {
      button.setAttribute("aria-pressed", String(button.getAttribute("aria-pressed") !== "true"));
      var hidden = Array.from(document.querySelectorAll('.legend button[aria-pressed="false"]')).map(function (b) { return b.dataset.run; });
      document.querySelectorAll(".plot.zoom .path").forEach(function (path) {
        path.classList.toggle("is-hidden", path.dataset.runs.split(" ").every(function (run) { return hidden.indexOf(run) >= 0; }));
      });
    });
  });

  // What is folded away is printed too.
  var folded = [];
  window.addEventListener("beforeprint", function () {
    folded = Array.from(document.querySelectorAll("details:not([open])"));
    folded.forEach(function (one) { one.open = true; });
  });
  window.addEventListener("afterprint", function () { folded.forEach(function (one) { one.open = false; }); });

  var live = document.getElementById("live");
  if (live) setInterval(function () { if (!document.hidden) location.reload(); }, 1000 * Number(live.dataset.refresh));
})();
