// What the loss of a node would mean now.
import { Card, CardBody, CardTitle, Content, List, ListItem } from '@patternfly/react-core';
import { useState } from 'react';
import { useCall } from '../../api/query';
import { care } from '../../strings/care';
import { SelectField } from '../../ui/fields';
import { bytes, duration, number } from '../../ui/format';
import { Loaded } from '../../ui/Page';

const s = care.whatIf;
const stakeMax = 200;

export function WhatIf() {
  const cluster = useCall('getCluster', {}, { every: 10_000 });
  const [chosen, setChosen] = useState('');
  const nodes = cluster.data?.nodes ?? [];
  const name = nodes.some((n) => n.name === chosen) ? chosen : cluster.data?.self ?? nodes[0]?.name ?? '';
  return (
    <Card className="varve-wide"><CardTitle component="h2">{s.title}</CardTitle><CardBody className="varve-stack">
      <Content component="p" className="varve-dim">{s.lead}</Content>
      <Loaded query={cluster}>
        {(c) => (
          <>
            {c.nodes.length > 1 && <SelectField label={s.node} name="node" value={name} onChange={setChosen} options={c.nodes.map((n) => [n.name, n.name === c.self ? `${n.name} (${s.here})` : n.name])} />}
            {name && <Loss name={name} cluster={c} />}
          </>
        )}
      </Loaded>
    </CardBody></Card>
  );
}

type Cluster = NonNullable<ReturnType<typeof useCall<'getCluster'>>['data']>;

function decision(c: Cluster, name: string): string {
  if (c.nodes.length === 1) return s.alone;
  if (!c.nodes.find((n) => n.name === name)?.voter) return s.extra;
  const left = c.nodes.filter((n) => n.voter && n.reachable && n.name !== name).length;
  return left > c.voters / 2 ? s.quorumKept(left, c.voters) : s.quorumLost(left, c.voters);
}

function Loss({ name, cluster }: { name: string; cluster: Cluster }) {
  const served = useCall('listVDisks', { query: { filter: `owner="${name}"`, limit: 1, count: true } }, { every: 30_000 });
  const stake = useCall('listProtection', { query: { filter: `owner="${name}" and unbacked>0`, limit: stakeMax, count: true } }, { every: 10_000 });
  const backends = useCall('listBackends', { query: { filter: `node="${name}"` } });
  const own = (backends.data?.items ?? []).filter((b) => b.kind === 'local').map((b) => b.vpool);
  return (
    <List>
      <ListItem>{decision(cluster, name)}</ListItem>
      {served.data && <ListItem>{served.data.count ? s.served(number(served.data.count)) : s.none}</ListItem>}
      {own.length > 0 && cluster.nodes.length > 1 && <ListItem>{s.backends(own.join(', '))}</ListItem>}
      {stake.data && <ListItem>{atStake(stake.data)}</ListItem>}
      {cluster.nodes.length > 1 && <ListItem>{s.console}</ListItem>}
    </List>
  );
}

function atStake(list: NonNullable<ReturnType<typeof useCall<'listProtection'>>['data']>): string {
  if (list.items.length === 0) return s.safe;
  const sum = bytes(list.items.reduce((n, p) => n + p.unbacked, 0));
  return s.stake(list.next ? s.atLeast(sum) : sum, number(list.count ?? list.items.length), duration(Math.max(...list.items.map((p) => p.unbacked_age))));
}
