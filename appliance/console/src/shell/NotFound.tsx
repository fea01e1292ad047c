import { Button, EmptyState, EmptyStateActions, EmptyStateBody, EmptyStateFooter, PageSection } from '@patternfly/react-core';
import { SearchIcon } from '@patternfly/react-icons';
import { useEffect } from 'react';
import { useNavigate } from 'react-router';
import { t } from '../strings';

export function NotFound() {
  const go = useNavigate();
  useEffect(() => void (document.title = `${t.notFound} · ${t.product}`), []);
  return (
    <PageSection>
      <EmptyState titleText={t.notFound} headingLevel="h1" icon={SearchIcon}>
        <EmptyStateBody>{t.notFoundBody}</EmptyStateBody>
        <EmptyStateFooter><EmptyStateActions><Button onClick={() => void go('/')}>{t.toOverview}</Button></EmptyStateActions></EmptyStateFooter>
      </EmptyState>
    </PageSection>
  );
}
