"use strict";
// Videos play while they are visible, and are unloaded otherwise: a browser plays only some dozens at a time.
const videos = [...document.querySelectorAll("video")];
const isVisible = new Set();
let isPaused = false;
for (const video of videos) {
  video.dataset.src = video.getAttribute("src");
  video.removeAttribute("src");
}
const update = (video) => {
  if (!isVisible.has(video)) {
    video.removeAttribute("src");
    video.load();
  } else {
    if (!video.hasAttribute("src")) video.src = video.dataset.src;
    if (isPaused) video.pause();
    else video.play().catch(() => {});
  }
};
const observer = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    if (isIntersecting === isVisible.has(target)) continue;
    if (isIntersecting) isVisible.add(target);
    else isVisible.delete(target);
    update(target);
  }
}, { rootMargin: "100px" });
videos.forEach((video) => observer.observe(video));
document.getElementById("pause").addEventListener("click", (event) => {
  isPaused = !isPaused;
  event.target.textContent = isPaused ? "Play" : "Pause";
  isVisible.forEach(update);
});
document.getElementById("restart").addEventListener("click", () => isVisible.forEach((video) => { video.currentTime = 0; }));
document.getElementById("size").addEventListener("input", (event) => {
  document.documentElement.style.setProperty("--side", `${event.target.value}px`);
});
document.getElementById("controls").hidden = false;
