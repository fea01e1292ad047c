// A page that fails takes nothing else down, and a part of the console that is gone after an update is loaded anew.
import { PageSection } from '@patternfly/react-core';
import { Component } from 'react';
import type { ReactNode } from 'react';
import { ProblemAlert } from '../ui/Problem';

export class PageBoundary extends Component<{ children: ReactNode }, { error: unknown }> {
  override state: { error: unknown } = { error: undefined };

  static getDerivedStateFromError(error: unknown) {
    return { error };
  }

  override componentDidCatch(error: unknown) {
    // Another version's scripts are asked for by their hash and are not there any more.
    if (String(error).includes('dynamically imported module') && !sessionStorage.getItem('varve.reloaded')) {
      sessionStorage.setItem('varve.reloaded', '1');
      location.reload();
    }
  }

  override render() {
    if (this.state.error === undefined) return this.props.children;
    return <PageSection><ProblemAlert error={this.state.error} onRetry={() => this.setState({ error: undefined })} /></PageSection>;
  }
}
