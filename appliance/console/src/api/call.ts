// Calls of the APIs by the name that the specification gives an operation: call('createVDisk', {body, query}).
//
// Method and path come from operations.gen.ts, the types from openapi-typescript's; so every call is one of the specification's, and what
// the console uses can be found by looking for names (test/console checks that no operation of the customer API is left out).
import type { operations as Customer } from './customer.gen';
import type { operations as Internal } from './internal.gen';
import { operations } from './operations.gen';

type Operations = Customer & Internal;
export type Op = keyof typeof operations & keyof Operations;

type Parameters<O extends Op> = Operations[O]['parameters'];
type Part<O extends Op, K extends string> = Parameters<O> extends { [P in K]: infer T } ? T : Parameters<O> extends { [P in K]?: infer T } ? T : undefined;
type Body<O extends Op> = Operations[O] extends { requestBody: { content: infer C } } ? C[keyof C] : undefined;
type Content<R> = R extends { content: { 'application/json': infer T } } ? T : never;
type Responses<O extends Op> = Operations[O] extends { responses: infer R } ? R : never;

/** What an operation answers. */
export type Answer<O extends Op> = Content<Responses<O>[keyof Responses<O> & (200 | 201 | 202)]>;
/** An item of what a list operation answers. */
export type ItemOf<O extends Op> = Answer<O> extends { items: (infer T)[] } ? T : never;

export interface Args<O extends Op> {
  path?: Part<O, 'path'>;
  query?: Partial<NonNullable<Part<O, 'query'>>>;
  body?: Body<O>;
  /** The rev that a change is based on; 0 for whatever is there. */
  rev?: number;
  signal?: AbortSignal;
}

/** What a change would do, as the server says with dryRun. */
export interface Effect {
  summary: string;
  changes: string[];
  lost: string[];
  affected: string[];
  reversible: boolean;
  confirm?: string;
}

/** An error of the APIs (RFC 9457), or of the way there (code "unreachable"). */
export class Problem extends Error {
  override name = 'Problem';
  constructor(
    readonly code: string,
    readonly status: number,
    readonly title: string,
    readonly detail: string,
    readonly remedy: string,
    readonly request: string,
    readonly object: string,
    readonly by: string[],
    readonly fields: { pointer: string; message: string }[],
    readonly operation: string,
  ) {
    super(detail || title);
  }
}

export function problemOf(e: unknown): Problem {
  if (e instanceof Problem) return e;
  const text = e instanceof Error ? e.message : String(e);
  return new Problem('internal', 0, 'Failed', text, '', '', '', [], [], '');
}

/** Whether a refusal for want of a session is one, and not the answer to signing in. */
const needsSession = (op: string) => !['signIn', 'setUp', 'setUpJoin', 'getSession'].includes(op);

const unreachable = (op: string) => new Problem('unreachable', 0, 'The appliance does not answer', 'The connection to this appliance failed.',
  'Check the network, or open the console of another node.', '', '', [], [], op);

async function readProblem(r: Response, op: string): Promise<Problem> {
  let p: Record<string, unknown> = {};
  try {
    p = (await r.json()) as Record<string, unknown>;
  } catch {
    p = {};
  }
  const text = (k: string) => (typeof p[k] === 'string' ? (p[k] as string) : '');
  return new Problem(text('code') || 'internal', r.status, text('title') || r.statusText || 'Failed', text('detail'), text('remedy'),
    text('request_id') || (r.headers.get('X-Request-Id') ?? ''), text('object'), Array.isArray(p.by) ? (p.by as string[]) : [],
    Array.isArray(p.errors) ? (p.errors as { pointer: string; message: string }[]) : [], op);
}

/** One call as others would make it: for "API and CLI". */
export interface Made {
  op: Op;
  method: string;
  url: string;
  body?: string;
  at: Date;
}

// The session's token against forged requests, and who wants to know about calls.
let csrf = '';
const madeListeners = new Set<(m: Made) => void>();
const endedListeners = new Set<() => void>();
export function setCSRF(token: string) {
  csrf = token;
}
export function onMade(f: (m: Made) => void): () => void {
  madeListeners.add(f);
  return () => madeListeners.delete(f);
}
/** Called when the session turns out to have ended. */
export function onSessionEnded(f: () => void): () => void {
  endedListeners.add(f);
  return () => endedListeners.delete(f);
}

export function urlOf<O extends Op>(op: O, args: Args<O>): string {
  let url: string = operations[op].path;
  for (const [k, v] of Object.entries((args.path ?? {}) as Record<string, unknown>)) url = url.replace(`{${k}}`, encodeURIComponent(String(v)));
  const q = new URLSearchParams();
  for (const [k, v] of Object.entries((args.query ?? {}) as Record<string, unknown>)) if (v !== undefined && v !== '' && v !== false) q.set(k, String(v));
  const text = q.toString();
  return text ? `${url}?${text}` : url;
}

const secrets = /"(password|old|new|secret|secret_key|client_secret|access_key|code|token)":"[^"]*"/g;

async function send<O extends Op>(op: O, args: Args<O>): Promise<Response> {
  const o = operations[op];
  const url = urlOf(op, args);
  const headers: Record<string, string> = { Accept: 'application/json, application/problem+json, application/effect+json' };
  const change = o.method !== 'GET';
  let body: string | undefined;
  if (change) {
    if (csrf) headers['X-Varve-CSRF'] = csrf;
    if (args.rev !== undefined) headers['If-Match'] = args.rev === 0 ? '*' : `"${args.rev}"`;
    if (args.body !== undefined) {
      headers['Content-Type'] = 'application/json';
      body = JSON.stringify(args.body);
    }
  }
  let r: Response;
  try {
    r = await fetch(url, { method: o.method, headers, body, signal: args.signal ?? null, credentials: 'same-origin' });
  } catch (e) {
    if (args.signal?.aborted) throw e;
    throw unreachable(op);
  }
  if (change && !url.includes('dryRun=true') && !url.startsWith('/api/internal')) {
    const made: Made = { op, method: o.method, url, at: new Date(), ...(body ? { body: body.replace(secrets, '"$1":"…"') } : {}) };
    madeListeners.forEach((f) => f(made));
  }
  if (!r.ok) {
    const p = await readProblem(r, op);
    if (r.status === 401 && needsSession(op)) endedListeners.forEach((f) => f());
    throw p;
  }
  return r;
}

/** Makes a call and gives its answer. Throws a Problem. */
export async function call<O extends Op>(op: O, args: Args<O> = {}): Promise<Answer<O>> {
  const r = await send(op, args);
  if (r.status === 204) return undefined as Answer<O>;
  const kind = r.headers.get('Content-Type') ?? '';
  return (kind.includes('json') && !kind.includes('ndjson') ? await r.json() : await r.text()) as Answer<O>;
}

/** Sends a file as the body of an operation, and tells how much of it has gone. Throws a Problem. */
export function upload<O extends Op>(op: O, file: Blob, sent: (bytes: number) => void, signal: AbortSignal): Promise<Answer<O>> {
  return new Promise((done, failed) => {
    // fetch does not tell how far an upload has come.
    const x = new XMLHttpRequest();
    x.open(operations[op].method, operations[op].path);
    x.setRequestHeader('Accept', 'application/json, application/problem+json');
    x.setRequestHeader('Content-Type', 'application/octet-stream');
    if (csrf) x.setRequestHeader('X-Varve-CSRF', csrf);
    x.upload.onprogress = (e) => sent(e.loaded);
    x.onerror = () => failed(unreachable(op));
    x.onabort = () => failed(new DOMException('The upload was stopped', 'AbortError'));
    x.onload = () => {
      const r = new Response(x.responseText, { status: x.status, statusText: x.statusText, headers: { 'X-Request-Id': x.getResponseHeader('X-Request-Id') ?? '' } });
      if (r.ok) return done(JSON.parse(x.responseText) as Answer<O>);
      if (r.status === 401) endedListeners.forEach((f) => f());
      void readProblem(r, op).then(failed);
    };
    signal.addEventListener('abort', () => x.abort(), { once: true });
    x.send(file);
  });
}

/** Asks the server what a change would do. */
export async function effectOf<O extends Op>(op: O, args: Args<O>): Promise<Effect> {
  const r = await send(op, { ...args, query: { ...args.query, dryRun: true } as unknown as Args<O>['query'] });
  return (await r.json()) as Effect;
}

export { operations };
