/* Sets the chosen theme before anything is painted; without a choice, the system's counts. */
"use strict";
try {
  const theme = localStorage.getItem("anima.theme");
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
} catch { /* a browser without storage */ }
