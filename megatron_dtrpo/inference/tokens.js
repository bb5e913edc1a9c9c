// Tokens as the pages draw them: as wide as their text while they are masked, coloured by confidence after that.
"use strict";
const $ = id => document.getElementById(id);
const percent = x => x > 0.999 && x < 1 ? ">99.9%" : (100 * x).toFixed(1) + "%";

// What a token that shows nothing by itself is drawn as.
function signOf(text, ends) {
  if (text === "") return ends ? "end" : "\u00b7";
  return /[\n\r]/.test(text) && !text.trim() ? "\u21b5" : null;
}

function tokenSpan(text, ends, sureness) {
  const span = document.createElement("span"), sign = signOf(text, ends);
  span.className = "token masked";
  span.dataset.text = text;
  if (sign) span.dataset.sign = sign;
  span.classList.toggle("breaks", /[\n\r]/.test(text));
  if (sign === "end") span.classList.add("end");
  span.style.setProperty("--sureness", sureness);
  span.tabIndex = 0;
  return span;
}
