(() => {
  "use strict";
  // Values of the charts: shown for the mark that has the focus or is nearest to the pointer. One tab stop a chart,
  // arrow keys between its marks, Escape hides. Without this script each mark has its <title>.
  const tip = document.createElement("div");
  tip.id = "tip";
  tip.hidden = true;
  tip.setAttribute("aria-hidden", "true"); // the mark's own label says the same
  document.body.append(tip);
  let shown = null;
  const hide = () => {
    if (shown) shown.classList.remove("on");
    shown = null;
    tip.hidden = true;
  };
  const show = (mark) => {
    if (shown !== mark) hide();
    shown = mark;
    mark.classList.add("on");
    tip.textContent = mark.getAttribute("aria-label");
    tip.hidden = false;
    const at = mark.querySelector(".hit").getBoundingClientRect();
    const room = document.documentElement.clientWidth - tip.offsetWidth - 8;
    const left = Math.max(8, Math.min(room, at.left + at.width / 2 - tip.offsetWidth / 2));
    const above = at.top - tip.offsetHeight - 6;
    tip.style.left = `${left + window.scrollX}px`;
    tip.style.top = `${(above > 4 ? above : at.bottom + 6) + window.scrollY}px`;
  };
  for (const chart of document.querySelectorAll("svg.chart")) {
    const marks = [...chart.querySelectorAll(".pt")];
    marks.forEach((mark, index) => {
      mark.querySelector("title").remove();
      mark.setAttribute("tabindex", index ? "-1" : "0");
      mark.addEventListener("focus", () => {
        marks.forEach((other) => other.setAttribute("tabindex", other === mark ? "0" : "-1"));
        show(mark);
      });
      mark.addEventListener("blur", hide);
    });
    chart.addEventListener("keydown", (event) => {
      const now = marks.indexOf(document.activeElement);
      const next = { ArrowRight: now + 1, ArrowDown: now + 1, ArrowLeft: now - 1, ArrowUp: now - 1, Home: 0, End: marks.length - 1 };
      if (now < 0 || !(event.key in next)) return;
      event.preventDefault();
      marks[Math.max(0, Math.min(marks.length - 1, next[event.key]))].focus();
    });
    const nearest = (event) => {
      let best = null;
      let least = 32; // pixels
      for (const mark of marks) {
        const box = mark.querySelector(".hit").getBoundingClientRect();
        const far = Math.hypot(box.left + box.width / 2 - event.clientX, box.top + box.height / 2 - event.clientY);
        if (far < least) [best, least] = [mark, far];
      }
      if (best) show(best);
      else hide();
    };
    chart.addEventListener("pointermove", nearest);
    chart.addEventListener("pointerdown", nearest);
    chart.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && hide());
  }
  document.addEventListener("keydown", (event) => event.key === "Escape" && hide());
  // Paper cannot be unfolded.
  let folded = [];
  window.addEventListener("beforeprint", () => {
    hide();
    folded = [...document.querySelectorAll("details:not([open])")];
    folded.forEach((one) => (one.open = true));
  });
  window.addEventListener("afterprint", () => folded.forEach((one) => (one.open = false)));
})();
