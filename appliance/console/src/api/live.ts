// One stream of changed objects keeps everything that is shown up to date.
//
//	connecting -> live -> (broken) reconnecting -> live, everything read anew
//
// EventSource is not used: it hides the comments that say that the stream still lives, and tells a refusal from a failure of the network
// only after its own retries.
import { useSyncExternalStore } from 'react';
import { invalidateKinds, queryClient } from './query';

export type LiveState = { state: 'connecting' | 'live' | 'reconnecting'; since: Date };

const silentMax = 40_000; // a comment comes every 15 s
const retryFirst = 1_000;
const retryMax = 15_000;
// Changes of this many milliseconds are one reading; and while they go on and on, one reading in so many, which bounds what a busy cluster costs.
const gather = 300;
const gatherBusy = 3_000;

let current: LiveState = { state: 'connecting', since: new Date() };
const listeners = new Set<() => void>();
function become(state: LiveState['state']) {
  if (current.state === state) return;
  current = { state, since: new Date() };
  listeners.forEach((f) => f());
}

export function useLive(): LiveState {
  return useSyncExternalStore(
    (f) => {
      listeners.add(f);
      return () => listeners.delete(f);
    },
    () => current,
  );
}

export interface Message {
  id: string;
  event: string;
  data: string;
}

/** Takes messages out of the text of an event stream; what is not complete yet stays in rest. */
export function parseStream(rest: string): { messages: Message[]; rest: string } {
  const messages: Message[] = [];
  for (;;) {
    const end = rest.indexOf('\n\n');
    if (end < 0) return { messages, rest };
    const block = rest.slice(0, end);
    rest = rest.slice(end + 2);
    const m: Message = { id: '', event: 'message', data: '' };
    let any = false;
    for (const line of block.split('\n')) {
      const colon = line.indexOf(':');
      if (colon <= 0) continue;
      const value = line.slice(colon + 1).replace(/^ /, '');
      const field = line.slice(0, colon);
      if (field === 'id') m.id = value;
      if (field === 'event') m.event = value;
      if (field === 'data') {
        m.data = any ? `${m.data}\n${value}` : value;
        any = true;
      }
    }
    if (any) messages.push(m);
  }
}

interface Change {
  kind: string;
  topic?: string;
}

/** Follows the stream until stop is called. */
export function followChanges(): () => void {
  const stopping = new AbortController();
  let last = '';
  let waiting: ReturnType<typeof setTimeout> | undefined;
  let readAt = 0;
  const kinds = new Set<string>();
  const changed = (list: Change[]) => {
    for (const c of list) {
      kinds.add(c.kind);
      if (c.topic) kinds.add(c.topic);
    }
    waiting ??= setTimeout(() => {
      waiting = undefined;
      readAt = Date.now();
      invalidateKinds(queryClient, kinds);
      kinds.clear();
    }, Math.max(gather, readAt + gatherBusy - Date.now()));
  };

  const once = async () => {
    const attempt = new AbortController();
    const abort = () => attempt.abort();
    stopping.signal.addEventListener('abort', abort);
    let silence = setTimeout(abort, silentMax);
    try {
      const r = await fetch('/api/internal/changes', { headers: last ? { 'Last-Event-ID': last } : {}, signal: attempt.signal, credentials: 'same-origin' });
      if (!r.ok || !r.body) throw new Error(`stream: ${r.status}`);
      const reader = r.body.pipeThrough(new TextDecoderStream()).getReader();
      let rest = '';
      for (;;) {
        const { done, value } = await reader.read();
        if (done) return;
        clearTimeout(silence);
        silence = setTimeout(abort, silentMax);
        const parsed = parseStream(rest + value);
        rest = parsed.rest;
        if (current.state !== 'live') {
          if (current.state === 'reconnecting') void queryClient.invalidateQueries();
          become('live');
        }
        for (const m of parsed.messages) {
          if (m.id) last = m.id;
          if (m.event === 'gap') void queryClient.invalidateQueries();
          if (m.event === 'change') changed(JSON.parse(m.data) as Change[]);
        }
      }
    } finally {
      clearTimeout(silence);
      stopping.signal.removeEventListener('abort', abort);
      attempt.abort();
    }
  };

  void (async () => {
    let retry = retryFirst;
    while (!stopping.signal.aborted) {
      const began = Date.now();
      try {
        await once();
      } catch {
        // shown as "reconnecting"
      }
      if (stopping.signal.aborted) return;
      become('reconnecting');
      if (Date.now() - began > retryMax) retry = retryFirst;
      await new Promise((done) => {
        const t = setTimeout(done, retry);
        stopping.signal.addEventListener('abort', () => (clearTimeout(t), done(undefined)), { once: true });
      });
      retry = Math.min(retry * 2, retryMax);
    }
  })();
  return () => {
    stopping.abort();
    clearTimeout(waiting);
    become('connecting');
  };
}
