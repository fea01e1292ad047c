// A state is an icon, a word and a colour, never a colour alone.
import { Label, Tooltip } from '@patternfly/react-core';
import type { LabelProps } from '@patternfly/react-core';
import { t } from '../strings';
import { storage } from '../strings/storage';
import { bytes, bytesDecimal, ago, percent, time, utc } from './format';

const colours: Record<string, LabelProps['status']> = {
  ok: 'success', healthy: 'success', succeeded: 'success', active: 'success', online: 'success', enabled: 'success', ready: 'success', open: 'info',
  warning: 'warning', degraded: 'warning', offline: 'warning', cancelled: 'warning', disabled: 'warning', full: 'warning',
  error: 'danger', failed: 'danger', failing: 'danger', unreachable: 'danger', critical: 'danger', halted: 'danger',
  running: 'info', queued: 'info', info: 'info', template: 'custom',
};

/** A state with its word; the word may be given another text. */
export function State({ value, text }: { value: string; text?: string }) {
  const status = colours[value.toLowerCase()];
  const word = text ?? t.states[value] ?? value.charAt(0).toUpperCase() + value.slice(1);
  return status ? <Label isCompact status={status}>{word}</Label> : <Label isCompact variant="outline">{word}</Label>;
}

/** Bytes, IEC; the hover says SI and exactly. */
export function Bytes({ n }: { n: number | undefined }) {
  if (n === undefined) return <>–</>;
  return <span title={bytesDecimal(n)}>{bytes(n)}</span>;
}

/** Says of figures whose node does not answer now that they are those of then. */
export function LastKnown({ at }: { at: string | undefined }) {
  return at ? <span className="varve-dim">{t.lastKnown} <When at={at} /></span> : null;
}

/** What is free of a vPool's place; a bucket says no limit. */
export function Free({ p }: { p: { free: number; total: number } }) {
  if (p.total <= 0) return <>{storage.noLimit}</>;
  return <><Bytes n={p.free} /> <span className="varve-dim">({percent(p.free, p.total)} %)</span></>;
}

/** A time as "3 min ago", or exactly; the hover says both with UTC. */
export function When({ at, exact }: { at: string | undefined; exact?: boolean }) {
  if (!at || at.startsWith('0001-')) return <>–</>;
  return (
    <Tooltip content={`${time(at)} (${utc(at)})`}>
      <time dateTime={at} tabIndex={-1}>{exact ? time(at) : ago(at)}</time>
    </Tooltip>
  );
}
