"use strict";
// Curves are drawn by the page itself; this reads them out at the pointer or by the arrow keys.
const short = (value, decimals) => {
  if (decimals !== null) return value.toFixed(decimals);
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size < 1e-3 || size >= 1e6) return value.toExponential(2).replace("e+", "e");
  return value.toFixed(Math.max(0, 3 - Math.floor(Math.log10(size))));
};

for (const chart of document.querySelectorAll(".chart")) {
  const data = JSON.parse(chart.querySelector("script").textContent);
  const plot = chart.querySelector(".plot"), cursor = chart.querySelector(".cursor"), said = chart.querySelector(".step");
  const dots = [...plot.querySelectorAll(".dot")], values = [...chart.querySelectorAll(".value")];
  const first = dots.map((dot, i) => [dot.style.left, dot.style.top, values[i].textContent]);
  const steps = [...new Set(data.lines.flatMap(line => line.x))].sort((a, b) => a - b);
  const across = step => 100 * (step - data.low) / (data.high - data.low);
  const down = value => 100 * (1 - (data.log
    ? Math.log(value / data.bottom) / Math.log(data.top / data.bottom)
    : (value - data.bottom) / (data.top - data.bottom)));
  const nearest = (list, wanted) => {
    let best = 0;
    list.forEach((x, i) => { if (Math.abs(x - wanted) < Math.abs(list[best] - wanted)) best = i; });
    return best;
  };
  let place = steps.length - 1;

  const show = index => {
    place = Math.max(0, Math.min(steps.length - 1, index));
    const step = steps[place];
    cursor.hidden = false;
    cursor.style.left = across(step) + "%";
    said.textContent = "step " + step.toLocaleString("en-US");
    data.lines.forEach((line, i) => {
      const at = nearest(line.x, step), value = line.y[at];
      const known = value !== null && step >= line.x[0] && step <= line.x[line.x.length - 1];
      values[i].textContent = known ? short(value, data.decimals) : "-";
      dots[i].style.visibility = known && !dots[i].classList.contains("reference") ? "visible" : "hidden";
      if (known) { dots[i].style.left = across(line.x[at]) + "%"; dots[i].style.top = down(value) + "%"; }
    });
  };
  const rest = () => {
    cursor.hidden = true;
    said.textContent = "";
    place = steps.length - 1;
    dots.forEach((dot, i) => {
      [dot.style.left, dot.style.top, values[i].textContent] = first[i];
      dot.style.visibility = "";
    });
  };
  plot.addEventListener("pointermove", event => {
    const box = plot.getBoundingClientRect();
    const share = (event.clientX - box.left) / box.width;
    show(nearest(steps, data.low + share * (data.high - data.low)));
  });
  plot.addEventListener("pointerleave", rest);
  plot.addEventListener("blur", rest);
  plot.addEventListener("keydown", event => {
    const by = { ArrowLeft: -1, ArrowRight: 1, PageUp: -10, PageDown: 10 }[event.key];
    if (by === undefined) return;
    event.preventDefault();
    show(cursor.hidden ? place : place + by);
  });
}
