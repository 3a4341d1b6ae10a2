"use strict";
window.sampimpData = (part) => {
  if (part.kind === "study") document.getElementById("app").textContent = part.title;
};
