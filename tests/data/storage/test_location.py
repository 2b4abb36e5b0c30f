import os

import pytest

from cogds.data.storage.location import absolute, display_name, join, parent


@pytest.mark.parametrize(
    ("text", "location"),
    [
        ("/data/a#1?.mp4", "/data/a#1?.mp4"),
        ("file:///data/a#1?.mp4", "/data/a#1?.mp4"),
        ("clips", os.path.join(os.getcwd(), "clips")),
        ("~/clips", os.path.expanduser("~/clips")),
        ("s3://bucket/a#1.mp4", "s3://bucket/a#1.mp4"),
        ("s3:/bucket", os.path.join(os.getcwd(), "s3:/bucket")),
    ],
)
def test_absolute(text, location):
    assert absolute(text) == location


def test_join():
    assert join("/data", "a.mp4") == "/data/a.mp4"
    assert join("/data", "s3://bucket/a.mp4") == "s3://bucket/a.mp4"
    assert join("/data", "file:///other/a.mp4") == "/other/a.mp4"
    assert join("s3://bucket/set", "../videos/a.mp4") == "s3://bucket/videos/a.mp4"


def test_a_member_of_a_tar_file():
    location = "s3://bucket/set/a.tar#x/b@1+2.mp4@512+20"
    assert display_name(location) == "s3://bucket/set/a.tar/x/b@1+2.mp4"
    assert parent(location) == "s3://bucket/set"
