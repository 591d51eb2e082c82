"""Drives a server with Permify's client for Python, over HTTP, and prints what comes as JSON lines.

    client.py ADDRESS watch TENANT SNAP_TOKEN COUNT
    client.py ADDRESS data TENANT
"""

import json
import sys

from permify import ApiClient, Configuration
from permify.api.data_api import DataApi
from permify.api.watch_api import WatchApi
from permify.exceptions import NotFoundException
from permify.models.data_delete_body import DataDeleteBody
from permify.models.data_write_body import DataWriteBody
from permify.models.read_attributes_body import ReadAttributesBody
from permify.models.read_relationships_body import ReadRelationshipsBody
from permify.models.stream_result_of_watch_response import StreamResultOfWatchResponse
from permify.models.watch_body import WatchBody


def say(what):
    print(json.dumps(what), flush=True)


def watch(client, tenant, token, count):
    """The client has no streams: its models read the lines, and the response comes without being read to its end."""
    body = WatchBody(snap_token=token)
    response = WatchApi(client).watch_watch_without_preload_content(tenant, body, _request_timeout=60.0)
    say({"status": response.status})
    # In this order, so that it does not wait for one line more.
    for _, line in zip(range(count), response):
        read = StreamResultOfWatchResponse.from_json(line)
        if read.error:
            say({"error": read.error.message})
        else:
            changes = read.result.changes
            say({"snap_token": changes.snap_token, "changes": [change.to_dict() for change in changes.data_changes]})
    response.close()


TUPLE = {
    "entity": {"type": "document", "id": "1"},
    "relation": "viewer",
    "subject": {"type": "user", "id": "u", "relation": ""},
}
ATTRIBUTE = {
    "entity": {"type": "document", "id": "1"},
    "attribute": "public",
    "value": {"@type": "type.googleapis.com/base.v1.BooleanValue", "data": True},
}


def data(client, tenant):
    api = DataApi(client)
    body = {"metadata": {"schema_version": ""}, "tuples": [TUPLE], "attributes": [ATTRIBUTE]}
    written = api.data_write(tenant, DataWriteBody.from_dict(body))
    say({"written": bool(written.snap_token)})

    metadata = {"snap_token": written.snap_token}
    everything = {"metadata": metadata, "filter": {"entity": {"type": "document"}}, "page_size": 10}
    tuples = api.data_relationships_read(tenant, ReadRelationshipsBody.from_dict(everything))
    attributes = api.data_attributes_read(tenant, ReadAttributesBody.from_dict(everything))
    say({"tuples": [one.to_dict() for one in tuples.tuples], "attributes": [one.to_dict() for one in attributes.attributes]})

    filters = {"tuple_filter": {"entity": {"type": "document"}}, "attribute_filter": {"entity": {"type": "document"}}}
    deleted = api.data_delete(tenant, DataDeleteBody.from_dict(filters))
    everything["metadata"] = {"snap_token": deleted.snap_token}
    left = api.data_relationships_read(tenant, ReadRelationshipsBody.from_dict(everything))
    say({"left": len(left.tuples)})

    try:
        api.data_write("nowhere", DataWriteBody.from_dict(body))
    except NotFoundException as error:
        say({"refused": json.loads(error.body)["message"]})


def main():
    address, command, tenant, *rest = sys.argv[1:]
    with ApiClient(Configuration(host=f"http://{address}")) as client:
        if command == "watch":
            watch(client, tenant, rest[0], int(rest[1]))
        else:
            data(client, tenant)


main()
