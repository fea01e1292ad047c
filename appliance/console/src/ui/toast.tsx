// Short messages that go by themselves, said to screen readers too; some with an undo.
import { Alert, AlertActionCloseButton, AlertActionLink, AlertGroup } from '@patternfly/react-core';
import type { AlertProps } from '@patternfly/react-core';
import { createContext, useCallback, useContext, useMemo, useRef, useState } from 'react';
import type { ReactNode } from 'react';
import { problemOf } from '../api/call';
import { t } from '../strings';

interface Toast {
  id: number;
  variant: AlertProps['variant'];
  title: string;
  body?: string | undefined;
  undo?: { text: string; do: () => void } | undefined;
}

interface Toasts {
  done: (title: string, undo?: Toast['undo']) => void;
  failed: (error: unknown, title?: string) => void;
}

const Context = createContext<Toasts>({ done: () => undefined, failed: () => undefined });
export const useToast = () => useContext(Context);

const undoTime = 10_000;

export function ToastProvider({ children }: { children: ReactNode }) {
  const [list, setList] = useState<Toast[]>([]);
  const next = useRef(1);
  const add = useCallback((toast: Omit<Toast, 'id'>) => setList((l) => [...l.slice(-4), { ...toast, id: next.current++ }]), []);
  const drop = (id: number) => setList((l) => l.filter((x) => x.id !== id));
  const value = useMemo<Toasts>(() => ({
    done: (title, undo) => add({ variant: 'success', title, undo }),
    failed: (error, title) => {
      const p = problemOf(error);
      add({ variant: 'danger', title: title ?? p.title, body: [p.detail, p.remedy].filter(Boolean).join(' ') });
    },
  }), [add]);
  return (
    <Context.Provider value={value}>
      {children}
      <AlertGroup isToast isLiveRegion>
        {list.map((x) => (
          <Alert key={x.id} variant={x.variant ?? 'info'} title={x.title} timeout={x.variant === 'danger' ? 20_000 : undoTime} onTimeout={() => drop(x.id)}
            actionClose={<AlertActionCloseButton title={x.title} onClose={() => drop(x.id)} aria-label={t.close} />}
            actionLinks={x.undo ? <AlertActionLink onClick={() => (x.undo?.do(), drop(x.id))}>{x.undo.text}</AlertActionLink> : undefined}>
            {x.body}
          </Alert>
        ))}
      </AlertGroup>
    </Context.Provider>
  );
}
