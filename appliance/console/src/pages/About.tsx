// What this is, where it runs, and under which licence.
import { Content } from '@patternfly/react-core';
import { useCall } from '../api/query';
import { operate } from '../strings/operate';
import { Facts } from '../ui/Facts';
import { Loaded, Page } from '../ui/Page';
import { When } from '../ui/State';

const s = operate.about;

export default function About() {
  const status = useCall('getStatus');
  return (
    <Page title={s.title} lead={s.lead} operations={['getStatus']}>
      <div className="varve-stack">
        <Loaded query={status}>
          {(x) => (
            <Facts items={[
              [s.version, x.version], [s.node, x.node], [s.cluster, <span className="varve-mono">{x.cluster}</span>], [s.component, <span className="varve-mono">{x.cluster.slice(0, 8)}.{x.node_id.slice(0, 8)}</span>],
              [s.started, <When at={x.started} exact />], [s.services, x.services.map((v) => `${v.name} ${v.address}`).join(', ')], [s.licence, s.licenceText], [s.api, <a href="/api/docs">{s.docs}</a>],
            ]} />
          )}
        </Loaded>
        <Content component="p">{s.nothing}</Content>
        <Content component="p" className="varve-dim">{s.libraries}</Content>
      </div>
    </Page>
  );
}
