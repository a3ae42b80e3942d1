/* Draws the charts of the page with uPlot. What uPlot leaves to others is here: the nearest point under the pointer or by
   arrow keys, its value shown and said, a legend of buttons, zoom by buttons, and colours that follow the reader's scheme. */
"use strict";
(() => {
  const DASHES = [[], [9, 4], [2, 3], [9, 3, 2, 3]];
  const HEIGHT = 340;
  const REACH = 60; // pixels from the pointer to the nearest point
  const HELP = "Arrow keys read values, up and down change the line, plus and minus zoom, 0 shows all.";
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const colour = (line) => css(line.colour === null ? "--neutral" : `--c${line.colour}`);
  const shown = (value) =>
    value.toLocaleString("en", Number.isInteger(value) ? {} : { maximumSignificantDigits: Math.abs(value) < 1000 ? 4 : 6 });

  function element(tag, properties = {}, ...children) {
    const made = Object.assign(document.createElement(tag), properties);
    made.append(...children);
    return made;
  }

  /* Round numbers between two others, about five of them. */
  function linearTicks(low, high) {
    const raw = (high - low) / 5, power = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= raw);
    const ticks = [];
    for (let at = Math.ceil(low / step); at * step <= high; at++) ticks.push(Number((at * step).toPrecision(12)));
    return ticks;
  }

  function logTicks(low, high) {
    if (high / low < 10) return linearTicks(low, high);
    const factors = high / low > 1000 ? [1] : [1, 2, 5], ticks = [];
    for (let power = Math.floor(Math.log10(low)); 10 ** power <= high; power++)
      ticks.push(...factors.map((factor) => factor * 10 ** power));
    return ticks.filter((tick) => tick >= low && tick <= high);
  }

  function series(line) {
    const hollow = line.style === "points";
    return {
      scale: "y", stroke: () => colour(line), width: line.style === "faint" ? 1 : 2, alpha: line.style === "faint" ? 0.5 : 1,
      dash: DASHES[line.dash], paths: hollow ? () => null : undefined,
      points: {
        show: hollow || (line.style === "strong" && line.x.length <= 60), size: hollow ? 10 : 7, width: 2,
        stroke: () => colour(line), fill: () => (hollow ? css("--paper") : colour(line)),
      },
    };
  }

  function axis(label, ticks, size) {
    const font = "13px system-ui, sans-serif";
    return {
      label, size, labelSize: 26, font, labelFont: font, stroke: () => css("--ink"), splits: ticks, filter: (_, all) => all,
      grid: { stroke: () => css("--line"), width: 1 }, ticks: { show: false }, values: (_, all) => all.map(shown),
    };
  }

  /* Draws the lowest and the highest value of each point. */
  function whiskers(plot, lines) {
    const context = plot.ctx;
    context.save();
    lines.forEach((line, index) => {
      if (!line.spread || !plot.series[index + 1].show) return;
      context.strokeStyle = colour(line);
      context.lineWidth = 1.5 * devicePixelRatio;
      context.beginPath();
      line.spread.forEach((ends, point) => {
        const x = plot.valToPos(line.x[point], "x", true);
        const [low, high] = ends.map((end) => plot.valToPos(end, "y", true));
        context.moveTo(x, low);
        context.lineTo(x, high);
      });
      context.stroke();
    });
    context.restore();
  }

  function draw(figure) {
    const chart = JSON.parse(figure.querySelector("script").textContent), lines = chart.lines;
    const saved = memory.get(`chart ${chart.title}`) || {};
    const hidden = new Set(saved.hidden || []);
    const place = element("div", { className: "plot", tabIndex: 0 });
    const live = element("p", { className: "unseen" });
    live.setAttribute("aria-live", "polite");
    const dot = element("div", { className: "dot", hidden: true }), tip = element("div", { className: "tip", hidden: true });
    let at = null; // the line and the point that are shown

    const keep = (_, low, high) => [low, high];
    const scale = (log, base) => ({ time: false, auto: false, distr: log ? 3 : 1, log: base, range: keep });
    const whole = { x: chart.xRange, y: chart.yRange };
    const xTicks = (_, __, low, high) => (chart.xTicks || linearTicks(low, high)).filter((tick) => tick >= low && tick <= high);
    const yTicks = (_, __, low, high) => (chart.logY ? logTicks : linearTicks)(low, high);
    figure.append(place, live);
    const plot = new uPlot(
      {
        width: place.clientWidth, height: HEIGHT, legend: { show: false },
        scales: { x: scale(chart.logX, 2), y: scale(chart.logY, 10) },
        axes: [axis(chart.xLabel, xTicks, 34), axis(chart.yLabel, yTicks, 58)],
        series: [{}, ...lines.map(series)],
        cursor: {
          x: false, y: false, points: { show: false }, drag: { x: true, y: true, uni: 25, dist: 5 },
          bind: { dblclick: () => () => zoomTo(whole) },
        },
        hooks: { draw: [(self) => whiskers(self, lines)], setScale: [(self) => self.status && remember()] },
      },
      uPlot.join(lines.map((line) => [line.x, line.y])),
      place,
    );
    plot.over.append(dot, tip);

    function zoomTo(ranges) {
      plot.batch(() => ["x", "y"].forEach((key) => plot.setScale(key, { min: ranges[key][0], max: ranges[key][1] })));
    }

    function remember() {
      const { x, y } = plot.scales, now = { x: [x.min, x.max], y: [y.min, y.max] };
      if (Object.values(now).flat().includes(null)) return; // uPlot is not done yet
      const zoom = JSON.stringify(now) === JSON.stringify(whole) ? undefined : now;
      memory.set(`chart ${chart.title}`, { hidden: [...hidden], zoom });
      show(at);
    }

    /* Zooms by a factor around the point that is shown, else around the middle. */
    function zoomBy(factor) {
      const size = { x: plot.over.clientWidth, y: plot.over.clientHeight };
      const centre = { x: size.x / 2, y: size.y / 2 };
      if (at) {
        centre.x = plot.valToPos(at.line.x[at.point], "x");
        centre.y = plot.valToPos(at.line.y[at.point], "y");
      }
      const ends = (key) => [centre[key] * (1 - 1 / factor), centre[key] + (size[key] - centre[key]) / factor];
      const range = (key) => ends(key).map((end) => plot.posToVal(end, key)).sort((a, b) => a - b);
      zoomTo({ x: range("x"), y: range("y") });
    }

    const isShown = (line) => !hidden.has(line.name);
    const inRange = (line, point) =>
      line.y[point] !== null && line.x[point] >= plot.scales.x.min && line.x[point] <= plot.scales.x.max;

    function nearest(left, top) {
      let best = null, least = REACH ** 2; // of equal ones the last, which is drawn on top
      for (const line of lines.filter(isShown))
        for (let point = 0; point < line.x.length; point++) {
          if (!inRange(line, point)) continue;
          const distance = (plot.valToPos(line.x[point], "x") - left) ** 2 + (plot.valToPos(line.y[point], "y") - top) ** 2;
          if (distance <= least) [best, least] = [{ line, point }, distance];
        }
      return best;
    }

    function words({ line, point }) {
      const name = [line.name, line.what].filter(Boolean).join(", ");
      const spread = line.spread ? ` (${shown(line.spread[point][0])} to ${shown(line.spread[point][1])})` : "";
      return [name, `${chart.xLabel}: ${shown(line.x[point])}`, `${chart.yLabel}: ${shown(line.y[point])}${spread}`];
    }

    function show(found) {
      at = found && isShown(found.line) && inRange(found.line, found.point) ? found : null;
      dot.hidden = tip.hidden = !at;
      if (!at) return;
      const left = plot.valToPos(at.line.x[at.point], "x"), top = plot.valToPos(at.line.y[at.point], "y");
      dot.hidden = top < 0 || top > plot.over.clientHeight;
      dot.style.cssText = `left:${left}px;top:${top}px;border-color:${colour(at.line)}`;
      tip.replaceChildren(...words(at).map((text, row) => element(row ? "div" : "strong", { textContent: text })));
      // Beside the point, where all of it is in sight.
      const width = plot.over.clientWidth, below = HEIGHT - plot.over.offsetTop - tip.offsetHeight - 4;
      const beside = left > width / 2 ? left - tip.offsetWidth - 12 : left + 12;
      tip.style.left = `${Math.max(0, Math.min(beside, width - tip.offsetWidth))}px`;
      tip.style.top = `${Math.max(0, Math.min(top, below))}px`;
    }

    plot.over.addEventListener("mousemove", (event) => show(nearest(event.offsetX, event.offsetY)));
    plot.over.addEventListener("mouseleave", () => show(null));

    /* The next point of the line in a direction, from the one that is shown. */
    function step(points, from, by) {
      const index = points.findIndex((point) => point >= from);
      return points[Math.max(0, Math.min(points.length - 1, (index < 0 ? points.length - 1 : index) + by))];
    }

    function move(key, far) {
      const visible = lines.filter((line) => isShown(line) && line.x.some((_, point) => inRange(line, point)));
      if (!visible.length) return;
      const pointsOf = (line) => [...line.x.keys()].filter((point) => inRange(line, point));
      let line = at ? at.line : visible[0], points = pointsOf(line), point = at ? at.point : points[0];
      if (key === "Home" || key === "End") point = key === "Home" ? points[0] : points[points.length - 1];
      else if (at && (key === "ArrowUp" || key === "ArrowDown")) {
        const x = line.x[point], next = visible.indexOf(line) + (key === "ArrowDown" ? 1 : visible.length - 1);
        line = visible[next % visible.length];
        point = pointsOf(line).reduce((a, b) => (Math.abs(line.x[b] - x) < Math.abs(line.x[a] - x) ? b : a));
      } else if (at) point = step(points, point, (key === "ArrowRight" ? 1 : -1) * (far ? 10 : 1));
      show({ line, point });
      live.textContent = words(at).join(". ");
    }

    place.addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey) return;
      const actions = { "+": () => zoomBy(2), "=": () => zoomBy(2), "-": () => zoomBy(0.5), 0: () => zoomTo(whole), Escape: () => show(null) };
      if (/^(Arrow|Home|End)/.test(event.key)) move(event.key, event.shiftKey);
      else if (actions[event.key]) actions[event.key]();
      else return;
      event.preventDefault();
    });

    const bar = element("div", { className: "bar" });
    for (const [text, label, action] of [["+", "Zoom in", () => zoomBy(2)], ["−", "Zoom out", () => zoomBy(0.5)], ["All", "Show all", () => zoomTo(whole)]]) {
      const button = element("button", { type: "button", textContent: text, title: label, onclick: action });
      button.setAttribute("aria-label", `${label}: ${chart.title}`);
      bar.append(button);
    }
    const names = [...new Map(lines.map((line) => [line.name, line])).keys()];
    const legend = element("div", { className: "legend" });
    const buttons = names.map((name) => {
      const own = lines.filter((line) => line.name === name), main = own.find((line) => line.style === "strong") || own[0];
      const sample = element("span", { className: "sample" });
      sample.innerHTML = `<svg width="30" height="10" aria-hidden="true"><path d="M1 5H29" stroke-width="2.5" stroke="var(${
        main.colour === null ? "--neutral" : `--c${main.colour}`})" stroke-dasharray="${DASHES[main.dash].join(" ")}"/></svg>`;
      const button = element("button", { type: "button", onclick: () => toggle([name]) }, sample, `${name} ${chart.values[name] || ""}`);
      legend.append(button);
      return [name, button];
    });

    function toggle(some) {
      const isOn = some.some((name) => hidden.has(name));
      some.forEach((name) => (isOn ? hidden.delete(name) : hidden.add(name)));
      applyHidden();
      remember();
    }

    function applyHidden() {
      buttons.forEach(([name, button]) => button.setAttribute("aria-pressed", String(!hidden.has(name))));
      lines.forEach((line, index) => plot.setSeries(index + 1, { show: isShown(line) }));
    }

    if (names.length > 8) legend.prepend(element("button", { type: "button", textContent: "All or none", onclick: () => toggle(names) }));
    figure.append(bar, legend);
    applyHidden();
    zoomTo(saved.zoom || whole);
    place.setAttribute("role", "application");
    place.setAttribute("aria-roledescription", "interactive chart");
    place.setAttribute("aria-label", `${chart.title}. ${chart.yLabel} by ${chart.xLabel}. ${names.length} in the legend: ${
      buttons.map(([, button]) => button.textContent).join("; ")}. ${HELP}`);

    new ResizeObserver(() => plot.setSize({ width: place.clientWidth, height: HEIGHT })).observe(place);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => plot.redraw());
    figure.plot = plot; // for tests
  }

  document.querySelectorAll("figure.chart").forEach(draw);
})();
