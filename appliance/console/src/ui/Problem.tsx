// What went wrong, with its remedy, and what to send to whoever is asked for help.
import { Alert, Button, Content } from '@patternfly/react-core';
import { useEffect, useRef, useState } from 'react';
import { problemOf } from '../api/call';
import { t } from '../strings';

export function ProblemAlert({ error, title, onRetry, focus }: { error: unknown; title?: string; onRetry?: () => void; focus?: boolean }) {
  const p = problemOf(error);
  const [copied, setCopied] = useState(false);
  const box = useRef<HTMLDivElement>(null);
  useEffect(() => {
    if (focus) box.current?.focus();
  }, [focus, error]);
  const copy = () => {
    const text = [p.operation, p.status, p.code, p.title, p.detail, p.remedy, p.request, p.object, p.by.join(', '), location.pathname, new Date().toISOString()];
    void navigator.clipboard.writeText(text.filter(Boolean).join('\n')).then(() => setCopied(true));
  };
  return (
    <div ref={box} tabIndex={-1}>
      <Alert isInline variant={p.status === 403 || p.code === 'unavailable' ? 'warning' : 'danger'} title={title ?? p.title} component="h2">
        {p.detail && <Content component="p">{p.detail}</Content>}
        {p.by.length > 0 && <Content component="p">{t.problem.held}: {p.by.join(', ')}</Content>}
        {p.fields.map((f) => <Content component="p" key={f.pointer}>{f.pointer}: {f.message}</Content>)}
        {p.remedy && <Content component="p"><strong>{p.remedy}</strong></Content>}
        <div className="varve-row">
          {onRetry && <Button variant="link" isInline onClick={onRetry}>{t.retry}</Button>}
          {p.request && <span className="varve-dim">{t.problem.request} {p.request}</span>}
          <Button variant="link" isInline onClick={copy}>{copied ? t.copied : t.problem.copy}</Button>
        </div>
      </Alert>
    </div>
  );
}
