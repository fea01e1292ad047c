// Numbers and times as people read them.

const units = ['B', 'KiB', 'MiB', 'GiB', 'TiB', 'PiB'];
const decimal = ['B', 'kB', 'MB', 'GB', 'TB', 'PB'];

function scaled(n: number, base: number, names: string[]): string {
  let i = 0;
  let x = Math.abs(n);
  while (x >= base && i < names.length - 1) {
    x /= base;
    i++;
  }
  const digits = i === 0 || x >= 100 || Number.isInteger(x) ? 0 : x >= 10 ? 1 : 2;
  return `${n < 0 ? '-' : ''}${x.toFixed(digits)} ${names[i]}`;
}

/** 10 GiB */
export const bytes = (n: number) => scaled(n, 1024, units);
/** 10.7 GB, for the hover. */
export const bytesDecimal = (n: number) => `${scaled(n, 1000, decimal)} (${n.toLocaleString('en')} bytes)`;

export const number = (n: number) => n.toLocaleString('en', { maximumFractionDigits: n < 10 ? 2 : 0 });
export const percent = (part: number, whole: number) => (whole > 0 ? Math.round((part / whole) * 100) : 0);

/** "3 min ago", "in 2 h". */
export function ago(at: string | Date, now = Date.now()): string {
  const s = (now - new Date(at).getTime()) / 1000;
  const text = duration(Math.abs(s));
  if (Math.abs(s) < 5) return 'just now';
  return s >= 0 ? `${text} ago` : `in ${text}`;
}

/** 45 s, 3 min, 2 h, 5 d; below a second 250 ms, 80 µs. */
export function duration(seconds: number): string {
  if (seconds === 0) return '0 s';
  if (seconds < 0.001) return `${Math.round(seconds * 1e6)} µs`;
  if (seconds < 1) return `${(seconds * 1000).toFixed(seconds < 0.01 ? 1 : 0)} ms`;
  if (seconds < 90) return `${Math.round(seconds)} s`;
  if (seconds < 90 * 60) return `${Math.round(seconds / 60)} min`;
  if (seconds < 36 * 3600) return `${Math.round(seconds / 3600)} h`;
  return `${Math.round(seconds / 86400)} d`;
}

const local = new Intl.DateTimeFormat('en-GB', { dateStyle: 'medium', timeStyle: 'medium' });
/** Local time; the hover shows UTC. */
export const time = (at: string | Date) => local.format(new Date(at));
export const utc = (at: string | Date) => `${new Date(at).toISOString().replace('T', ' ').slice(0, 19)} UTC`;

/** Splits VPOOL/PATH. */
export function splitName(name: string): { pool: string; path: string } {
  const i = name.indexOf('/');
  return i < 0 ? { pool: name, path: '' } : { pool: name.slice(0, i), path: name.slice(i + 1) };
}

const quantity = /^\s*(\d+(?:\.\d+)?)\s*([KMGTP]?)(i?B?)?\s*$/i;

/** Reads "10 GiB" as bytes for a check in a form; the server reads it again. NaN where it is none. */
export function parseBytes(text: string): number {
  const m = quantity.exec(text);
  if (!m) return NaN;
  const base = m[3]?.toLowerCase().startsWith('i') || !m[3] ? 1024 : 1000;
  return Math.round(Number(m[1]) * base ** ['', 'K', 'M', 'G', 'T', 'P'].indexOf((m[2] ?? '').toUpperCase()));
}

/** A cell of a CSV file; what a spreadsheet would take for a formula is not one. */
export function csvCell(v: unknown): string {
  let s = v === null || v === undefined ? '' : Array.isArray(v) ? v.join(' ') : String(v);
  if (typeof v === 'string' && /^[=+\-@\t\r]/.test(s)) s = `'${s}`;
  return /[",\n\r]/.test(s) ? `"${s.replaceAll('"', '""')}"` : s;
}
