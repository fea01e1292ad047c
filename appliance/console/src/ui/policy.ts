// A policy's settings in words.
import { storage } from '../strings/storage';
import { bytes, number } from './format';

const s = storage.policy;

interface Retention {
  all_days?: number;
  buckets?: { days: number; count: number }[];
  count_max?: number;
}

function retention(r: Retention): string {
  return [
    ...(r.all_days ? [s.all(r.all_days)] : []),
    ...(r.buckets ?? []).map((b) => s.bucket(b.count, b.days)),
    ...(r.count_max ? [s.max(r.count_max)] : []),
  ].join(', ') || s.nothing;
}

/** The name of a setting. */
export const settingName = (key: string) => s.names[key] ?? key.replaceAll('_', ' ');

/** Its value: what a number means, a retention rule as a sentence. */
export function settingText(key: string, value: unknown): string {
  if (value === undefined || value === null || value === '') return storage.none;
  if (key.endsWith('retention') && typeof value === 'object') return retention(value as Retention);
  if (typeof value === 'number') {
    switch (key) {
      case 'iops_max': return value > 0 ? `${number(value)}/s` : storage.vdisks.unlimited;
      case 'bytes_max': return value > 0 ? `${bytes(value)}/s` : storage.vdisks.unlimited;
      case 'space_overhead_percent': return `${value} %`;
      case 'verify_days': return s.days(value);
      case 'rewind_seconds': return value > 0 ? s.hours(value / 3600) : s.off;
    }
    return number(value);
  }
  return typeof value === 'object' ? JSON.stringify(value) : String(value);
}
