import { Page } from '../ui/Page';

export default function VPool() {
  return <Page title="VPool" operations={[]}>{null}</Page>;
}
