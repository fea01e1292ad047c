// Runs before anything is drawn, so that a dark page does not flash white.
(function () {
  var chosen = null;
  try { chosen = localStorage.getItem('varve.theme'); } catch (e) { chosen = null; }
  var dark = chosen === 'dark' || (chosen !== 'light' && matchMedia('(prefers-color-scheme: dark)').matches);
  document.documentElement.classList.toggle('pf-v6-theme-dark', dark);
})();
