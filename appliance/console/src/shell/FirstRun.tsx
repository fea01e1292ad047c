import { Page } from '../ui/Page';

export default function FirstRun() {
  return <Page title="First run" operations={[]}>{null}</Page>;
}
