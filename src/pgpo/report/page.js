"use strict";
// Adds to a page that is whole without it: readings under the pointer or the arrow keys, for charts and for tokens.
(() => {
  const readings = JSON.parse(document.getElementById("readings").textContent);
  const tip = document.createElement("div");
  tip.className = "tip";
  tip.setAttribute("role", "status");
  document.body.append(tip);

  const hideTip = () => {
    tip.classList.remove("on");
    document.querySelectorAll(".cursor.on").forEach((line) => line.classList.remove("on"));
  };
  const showTip = (x, y) => {
    const { width, height } = tip.getBoundingClientRect();
    const left = x + 16 + width > innerWidth ? x - 16 - width : x + 16;
    const top = y + 16 + height > innerHeight ? y - 12 - height : y + 16;
    tip.style.left = Math.max(4, Math.min(left, innerWidth - width - 4)) + "px";
    tip.style.top = Math.max(4, top) + "px";
    tip.classList.add("on");
  };
  const text = (name, content, className) => {
    const element = document.createElement(name);
    element.textContent = content;
    if (className) element.className = className;
    return element;
  };
  const format = (value) => {
    const size = Math.abs(value);
    const plain = size === 0 || (size >= 1e-3 && size < 1e5);
    return (plain ? String(Number(value.toPrecision(3))) : value.toExponential(2)).replace("-", "−");
  };
  const nearest = (grid, step) => {
    let best = 0;
    grid.forEach((value, i) => { if (Math.abs(value - step) < Math.abs(grid[best] - step)) best = i; });
    return best;
  };

  // Charts: a line at the step in every chart of the section, the numbers of the one that is asked.
  const show = (svg, step, clientX, clientY) => {
    const chart = readings[svg.dataset.chart];
    const section = svg.closest("section");
    const off = new Set([...section.querySelectorAll(".legend input:not(:checked)")].map((box) => Number(box.value)));
    const grid = chart.x.length ? chart.x.reduce((a, b) => (b.length > a.length ? b : a)) : [];
    if (!grid.length) return step;
    const at = grid[nearest(grid, step)];
    section.querySelectorAll("svg[data-chart]").forEach((other) => {
      const [left, right, low, high] = other.dataset.frame.split(" ").map(Number);
      const line = other.querySelector(".cursor");
      const inside = at >= low && at <= high;
      line.classList.toggle("on", inside);
      if (!inside) return;
      const place = left + ((at - low) / (high - low)) * (right - left);
      line.setAttribute("x1", place);
      line.setAttribute("x2", place);
    });
    tip.replaceChildren(text("b", "step " + format(Math.round(at)) + (chart.u ? "  ·  " + chart.u : "")));
    const rows = [];
    for (const series of chart.s) {
      const i = nearest(chart.x[series.x], at);
      const value = series.y[i];
      const far = Math.abs(chart.x[series.x][i] - at) > (grid.length > 1 ? grid[1] - grid[0] : 1);
      if (value === null || far || off.has(series.m)) continue;
      const row = document.createElement("div");
      const band = series.l && series.l[i] !== null ? "  [" + format(series.l[i]) + ", " + format(series.h[i]) + "]" : "";
      row.append(text("i", "", "c" + series.c), text("span", series.n), text("span", format(value) + band));
      rows.push([value, row]);
    }
    tip.append(...rows.sort((a, b) => b[0] - a[0]).map(([, row]) => row)); // as the lines lie
    showTip(clientX, clientY);
    return at;
  };
  document.querySelectorAll("svg[data-chart]").forEach((svg) => {
    const [left, right, low, high] = svg.dataset.frame.split(" ").map(Number);
    const stepAt = (clientX) => {
      const box = svg.getBoundingClientRect();
      const x = ((clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
      return low + ((Math.max(left, Math.min(right, x)) - left) / (right - left)) * (high - low);
    };
    let current = high;
    const showAtStep = (step) => {
      const box = svg.getBoundingClientRect();
      const x = left + ((step - low) / (high - low)) * (right - left);
      current = show(svg, step, box.left + (x / svg.viewBox.baseVal.width) * box.width, box.top + box.height * 0.3);
    };
    svg.setAttribute("tabindex", "0");
    svg.addEventListener("pointermove", (event) => { current = show(svg, stepAt(event.clientX), event.clientX, event.clientY); });
    svg.addEventListener("pointerdown", (event) => { current = show(svg, stepAt(event.clientX), event.clientX, event.clientY); });
    svg.addEventListener("pointerleave", hideTip);
    svg.addEventListener("blur", hideTip);
    svg.addEventListener("keydown", (event) => {
      const grid = readings[svg.dataset.chart].x.reduce((a, b) => (b.length > a.length ? b : a), []);
      if (event.key === "Escape") return hideTip();
      const i = nearest(grid, current);
      const next = { ArrowLeft: i - 1, ArrowRight: i + 1, Home: 0, End: grid.length - 1 }[event.key];
      if (next === undefined || !grid.length) return;
      event.preventDefault();
      showAtStep(grid[Math.max(0, Math.min(grid.length - 1, next))]);
    });
  });

  // Tokens: one stop of the Tab key per completion, the arrow keys move on from there.
  document.querySelectorAll(".completion").forEach((completion) => {
    const tokens = [...completion.querySelectorAll(".tok[title]")];
    const show = (token) => {
      const box = token.getBoundingClientRect();
      tip.replaceChildren(text("span", token.dataset.numbers));
      showTip(box.left, box.bottom - 8);
    };
    tokens.forEach((token, i) => {
      token.dataset.numbers = token.title;
      token.setAttribute("aria-description", token.title);
      token.removeAttribute("title"); // the browser's own tooltip would cover ours
      token.tabIndex = i === 0 ? 0 : -1;
      token.addEventListener("pointerenter", () => show(token));
      token.addEventListener("pointerleave", hideTip);
      token.addEventListener("click", () => show(token));
      token.addEventListener("focus", () => show(token));
      token.addEventListener("blur", hideTip);
      token.addEventListener("keydown", (event) => {
        if (event.key === "Escape") return hideTip();
        const next = { ArrowLeft: i - 1, ArrowRight: i + 1, Home: 0, End: tokens.length - 1 }[event.key];
        if (next === undefined || !tokens[next]) return;
        event.preventDefault();
        token.tabIndex = -1;
        tokens[next].tabIndex = 0;
        tokens[next].focus();
      });
    });
  });
  addEventListener("scroll", hideTip, { passive: true });
})();
