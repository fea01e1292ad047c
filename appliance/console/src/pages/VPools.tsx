import { Page } from '../ui/Page';

export default function VPools() {
  return <Page title="VPools" operations={[]}>{null}</Page>;
}
