// Dialogs: a form whose problems stand beside what they concern, and the confirmation of what destroys.
//
// Destructive actions have three levels: (a) done at once with an undo in a toast; (b) a dialog that says what the server says it does;
// (c) the same, and the object's name has to be typed, which the server checks again. Which of b and c it is, the server's dry run says.
import {
  Alert, Button, Content, Form, FormGroup, FormHelperText, HelperText, HelperTextItem, List, ListItem, Modal, ModalBody, ModalFooter, ModalHeader, Spinner, TextInput,
} from '@patternfly/react-core';
import { useCallback, useEffect, useId, useLayoutEffect, useRef, useState } from 'react';
import type { FormEvent, ReactNode } from 'react';
import { call, effectOf, operations, problemOf } from '../api/call';
import type { Answer, Args, Effect, Op } from '../api/call';
import { t } from '../strings';
import { FieldErrors } from './fields';
import { ProblemAlert } from './Problem';

/** What a form's submit gives when its dialog is to stay open, to show what came of it. */
export const stay = Symbol('stay');

/** A dialog with a form. What was typed stays when the server refuses; the problem gets the focus. */
export function FormDialog({ title, description, submit, onSubmit, onClose, children, disabled, wide, danger }: {
  title: string;
  description?: ReactNode;
  submit: string;
  onSubmit: () => Promise<unknown>;
  onClose: () => void;
  children: ReactNode;
  disabled?: boolean;
  wide?: boolean;
  danger?: boolean;
}) {
  const [busy, setBusy] = useState(false);
  const [error, setError] = useState<unknown>();
  const id = useId();
  const go = async (e: FormEvent) => {
    e.preventDefault();
    if (busy || disabled) return;
    setBusy(true);
    setError(undefined);
    try {
      if ((await onSubmit()) === stay) setBusy(false);
      else onClose();
    } catch (caught) {
      setError(caught);
      setBusy(false);
      focusField(id, caught);
    }
  };
  return (
    <Modal isOpen variant={wide ? 'medium' : 'small'} onClose={onClose} aria-labelledby={`${id}-title`}>
      <ModalHeader title={title} labelId={`${id}-title`} description={description} />
      <ModalBody>
        <FieldErrors.Provider value={fieldErrors(error)}>
          <Form id={id} onSubmit={(e) => void go(e)} noValidate>
            {error !== undefined && <ProblemAlert error={error} focus />}
            {children}
            <FirstField form={id} />
          </Form>
        </FieldErrors.Provider>
      </ModalBody>
      <ModalFooter>
        <Button type="submit" form={id} variant={danger ? 'danger' : 'primary'} isLoading={busy} isDisabled={busy || disabled === true}>{submit}</Button>
        <Button variant="link" onClick={onClose}>{t.cancel}</Button>
      </ModalFooter>
    </Modal>
  );
}

/** Has the keyboard begin at the form's first field, not at the button that closes; unless a field has asked for it. */
function FirstField({ form }: { form: string }) {
  useLayoutEffect(() => {
    const f = document.getElementById(form);
    if (!f?.contains(document.activeElement)) f?.querySelector<HTMLElement>('[name]:not([disabled])')?.focus();
  }, [form]);
  return null;
}

/** What the server says of fields, by the field's name in the request's body. */
export function fieldErrors(error: unknown): Record<string, string> {
  if (error === undefined) return {};
  return Object.fromEntries(problemOf(error).fields.map((f) => [f.pointer.replace(/^\//, ''), f.message]));
}

function focusField(form: string, error: unknown) {
  const first = problemOf(error).fields[0];
  if (!first) return;
  requestAnimationFrame(() => document.querySelector<HTMLElement>(`#${CSS.escape(form)} [name="${CSS.escape(first.pointer.slice(1))}"]`)?.focus());
}


interface DestroyProps<O extends Op> {
  title: string;
  /** The button's word: Delete, Roll back. */
  verb: string;
  op: O;
  args: Args<O>;
  /** More to choose above the effect; the effect is asked for again when args change. */
  children?: ReactNode;
  onDone: (answer: Answer<O>) => void;
  onClose: () => void;
}

/** Asks before an operation that destroys: the server's dry run says what would happen, and which name is to be typed. */
export function Destroy<O extends Op>({ title, verb, op, args, children, onDone, onClose }: DestroyProps<O>) {
  const [effect, setEffect] = useState<Effect>();
  const [typed, setTyped] = useState('');
  const [busy, setBusy] = useState(false);
  const [error, setError] = useState<unknown>();
  const id = useId();
  const key = JSON.stringify(args);
  useEffect(() => {
    let gone = false;
    setEffect(undefined);
    setError(undefined);
    if (!operations[op].dry) {
      setEffect({ summary: operations[op].summary, changes: [], lost: [], affected: [], reversible: false });
      return;
    }
    effectOf(op, JSON.parse(key) as Args<O>).then((e) => gone || setEffect(e), (e: unknown) => gone || setError(e));
    return () => void (gone = true);
  }, [op, key]);
  const wanted = effect?.confirm ?? '';
  const ready = effect !== undefined && (wanted === '' || typed === wanted);
  const go = async (e: FormEvent) => {
    e.preventDefault();
    if (!ready || busy) return;
    setBusy(true);
    setError(undefined);
    try {
      onDone(await call(op, wanted ? { ...args, query: { ...args.query, confirm: wanted } as unknown as Args<O>['query'] } as Args<O> : args));
      onClose();
    } catch (caught) {
      setError(caught);
      setBusy(false);
    }
  };
  return (
    <Modal isOpen variant="small" onClose={onClose} aria-labelledby={`${id}-title`}>
      <ModalHeader title={title} titleIconVariant="warning" labelId={`${id}-title`} />
      <ModalBody>
        <Form id={id} onSubmit={(e) => void go(e)}>
          {error !== undefined && <ProblemAlert error={error} focus />}
          {children}
          {effect === undefined && error === undefined && <div aria-live="polite"><Spinner size="md" /> {t.confirm.asking}</div>}
          {effect && <EffectView effect={effect} />}
          {wanted !== '' && (
            <FormGroup label={t.confirm.type(wanted)} fieldId={`${id}-typed`} isRequired>
              <TextInput id={`${id}-typed`} value={typed} onChange={(_, v) => setTyped(v)} autoComplete="off" spellCheck={false} data-autofocus
                validated={typed === '' || typed === wanted ? 'default' : wanted.startsWith(typed) ? 'default' : 'error'} />
            </FormGroup>
          )}
        </Form>
      </ModalBody>
      <ModalFooter>
        <Button type="submit" form={id} variant="danger" isLoading={busy} isDisabled={!ready || busy}>{verb}</Button>
        <Button variant="link" onClick={onClose}>{t.cancel}</Button>
      </ModalFooter>
    </Modal>
  );
}

/** What the server says that a change does. */
export function EffectView({ effect }: { effect: Effect }) {
  const part = (heading: string, lines: string[]) => lines.length > 0 && (
    <div>
      <Content component="h3">{heading}</Content>
      <List>{lines.map((x) => <ListItem key={x}>{x}</ListItem>)}</List>
    </div>
  );
  return (
    <Alert isInline variant={effect.lost.length > 0 ? 'danger' : 'info'} title={effect.summary} component="h2" className="varve-effect">
      {part(t.confirm.effect, effect.changes)}
      {part(t.confirm.lost, effect.lost)}
      {part(t.confirm.affected, effect.affected)}
      <Content component="p">{effect.reversible ? t.confirm.reversible : t.confirm.final}</Content>
    </Alert>
  );
}

/** The same on many objects: all are listed, and their number has to be typed. One after the other; what fails is told and the rest goes on. */
export function DestroyMany<T>({ title, verb, items, name, act, onDone, onClose }: {
  title: string;
  verb: string;
  items: T[];
  name: (item: T) => string;
  act: (item: T) => Promise<unknown>;
  onDone: () => void;
  onClose: () => void;
}) {
  const [typed, setTyped] = useState('');
  const [busy, setBusy] = useState(false);
  const [failed, setFailed] = useState<[string, unknown][]>([]);
  const [done, setDone] = useState(0);
  const running = useRef(true);
  useEffect(() => () => void (running.current = false), []);
  const id = useId();
  const ready = typed === String(items.length);
  const go = useCallback(async () => {
    setBusy(true);
    const wrong: [string, unknown][] = [];
    for (const item of items) {
      if (!running.current) return;
      try {
        await act(item);
        setDone((n) => n + 1);
      } catch (e) {
        wrong.push([name(item), e]);
      }
    }
    setFailed(wrong);
    onDone();
    if (wrong.length === 0) onClose();
  }, [items, act, name, onDone, onClose]);
  return (
    <Modal isOpen variant="small" onClose={onClose} aria-labelledby={`${id}-title`}>
      <ModalHeader title={title} titleIconVariant="warning" labelId={`${id}-title`} />
      <ModalBody>
        <Form id={id} onSubmit={(e) => (e.preventDefault(), ready && !busy && void go())}>
          {failed.map(([n, e]) => <ProblemAlert key={n} error={e} title={n} />)}
          <List className="varve-long">{items.map((x) => <ListItem key={name(x)}>{name(x)}</ListItem>)}</List>
          <FormGroup label={t.confirm.typeNumber(items.length)} fieldId={`${id}-typed`} isRequired>
            <TextInput id={`${id}-typed`} value={typed} onChange={(_, v) => setTyped(v)} inputMode="numeric" autoComplete="off" />
            {busy && <FormHelperText><HelperText isLiveRegion><HelperTextItem>{done} / {items.length}</HelperTextItem></HelperText></FormHelperText>}
          </FormGroup>
        </Form>
      </ModalBody>
      <ModalFooter>
        <Button type="submit" form={id} variant="danger" isLoading={busy && failed.length === 0} isDisabled={!ready || busy}>{verb}</Button>
        <Button variant="link" onClick={onClose}>{failed.length > 0 ? t.close : t.cancel}</Button>
      </ModalFooter>
    </Modal>
  );
}
