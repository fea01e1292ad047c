// The chosen theme: 'system', 'light' or 'dark'. public/theme.js puts it on before anything is drawn.
import { useSyncExternalStore } from 'react';

export type Theme = 'system' | 'light' | 'dark';
const key = 'varve.theme';
const listeners = new Set<() => void>();
const systemDark = matchMedia('(prefers-color-scheme: dark)');

function apply() {
  const chosen = chosenTheme();
  document.documentElement.classList.toggle('pf-v6-theme-dark', chosen === 'dark' || (chosen === 'system' && systemDark.matches));
  listeners.forEach((f) => f());
}
systemDark.addEventListener('change', apply);

export function chosenTheme(): Theme {
  const v = localStorage.getItem(key);
  return v === 'light' || v === 'dark' ? v : 'system';
}

export function chooseTheme(v: Theme) {
  if (v === 'system') localStorage.removeItem(key);
  else localStorage.setItem(key, v);
  apply();
}

export function useTheme(): Theme {
  return useSyncExternalStore((f) => (listeners.add(f), () => listeners.delete(f)), chosenTheme);
}

/** Whether what is drawn now is dark: for canvases, which do not follow style sheets. */
export function useDark(): boolean {
  return useSyncExternalStore((changed) => {
    const watch = new MutationObserver(changed);
    watch.observe(document.documentElement, { attributeFilter: ['class'] });
    return () => watch.disconnect();
  }, () => document.documentElement.classList.contains('pf-v6-theme-dark'));
}
