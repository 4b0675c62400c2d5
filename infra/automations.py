"""Automations on a Prefect server: `python infra/automations.py [--webhook URL]`. Run again, it changes nothing.

`clear-zombie-runs` marks runs as crashed whose heartbeats ended, since their machine was lost. With --webhook,
`tell-of-failures` posts {"text": …} to that address (Slack, Mattermost …) when a run fails or crashes.
"""

import argparse
import sys
from typing import Any

from prefect import get_client
from prefect.blocks.notifications import CustomWebhookNotificationBlock
from prefect.events.actions import ChangeFlowRunState, SendNotification
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture

_RUN = {"prefect.resource.id": "prefect.flow-run.*"}
_ENDS = ("Completed", "Failed", "Cancelled", "Crashed")
# Three heartbeats of infra/prefect.yaml
_SILENCE_S = 90


def zombies() -> AutomationCore:
    """Runs whose heartbeats ended without an end are crashed."""
    beat = "prefect.flow-run.heartbeat"
    trigger = EventTrigger(
        match=_RUN, for_each={"prefect.resource.id"}, after={beat}, posture=Posture.Proactive, threshold=1,
        expect={beat, *(f"prefect.flow-run.{end}" for end in _ENDS)}, within=_SILENCE_S,
    )  # fmt: skip
    message = f"No heartbeat for {_SILENCE_S} seconds: the machine of this run was lost. Run it again: it goes on."
    return AutomationCore(
        name="clear-zombie-runs", trigger=trigger, actions=[ChangeFlowRunState(state="CRASHED", message=message)]
    )


def failures(webhook: str) -> AutomationCore:
    """A message for every run that fails or crashes."""
    block: Any = CustomWebhookNotificationBlock(
        name="tell-of-failures", url=webhook, json_data={"text": "{{subject}}\n{{body}}"}, allow_private_urls=True
    )
    number = block.save("tell-of-failures", overwrite=True)
    trigger = EventTrigger(
        match=_RUN, for_each={"prefect.resource.id"}, expect={"prefect.flow-run.Failed", "prefect.flow-run.Crashed"},
        posture=Posture.Reactive, threshold=1,
    )  # fmt: skip
    told = SendNotification(
        block_document_id=number, subject="{{ flow.name }}: {{ flow_run.state.name }}",
        body="{{ flow_run.name }}: {{ flow_run.state.message }}\n{{ flow_run|ui_url }}",
    )  # fmt: skip
    return AutomationCore(name="tell-of-failures", trigger=trigger, actions=[told])


def put(automation: AutomationCore) -> None:
    """Create an automation, in place of one of the same name."""
    with get_client(sync_client=True) as client:
        for known in client.read_automations_by_name(automation.name):
            client.delete_automation(known.id)
        client.create_automation(automation)
    print(f"automation {automation.name}: in place", flush=True)


def flags() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python infra/automations.py", description="Automations on a Prefect server.")
    parser.add_argument("--webhook", help="address to post to when a run fails or crashes")
    return parser


def main(arguments: list[str]) -> int:
    """Put the automations onto the server that Prefect's settings name."""
    webhook = flags().parse_args(arguments).webhook
    put(zombies())
    if webhook:
        put(failures(webhook))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
