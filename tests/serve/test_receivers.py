"""Where webhooks may go: URLs and addresses in every spelling."""

import pytest

from diffusion_kd import errors
from serve import receivers


@pytest.mark.parametrize(
    "url",
    [
        "https://example.com",
        "http://example.com:8080/hooks?token=a#part",
        "https://EXAMPLE.com./x",
        "https://xn--bcher-kva.example/",
        "https://8.8.8.8/",
        "https://134744072/",
        "https://[2606:4700::1111]:8443/x",
        "https://[::ffff:8.8.8.8]/",
        "https://[64:ff9b::808:808]/",
        "https://localhost.example.com/",
    ],
)
def test_public_urls_are_taken(url: str) -> None:
    receivers.check_url(url, allow_private=False)


PRIVATE = [
    "127.0.0.1",
    "127.1",
    "127.0.0.1.",
    "2130706433",
    "0x7f000001",
    "0x7f.1",
    "0177.0.0.1",
    "017700000001",
    "0",
    "0.0.0.0",
    "10.0.0.1",
    "172.16.3.4",
    "192.168.0.1",
    "169.254.169.254",
    "0xa9fea9fe",
    "100.64.0.1",
    "224.0.0.1",
    "240.0.0.1",
    "255.255.255.255",
    "192.0.2.1",
    "[::1]",
    "[::]",
    "[0:0:0:0:0:0:0:1]",
    "[::ffff:127.0.0.1]",
    "[::ffff:7f00:1]",
    "[::ffff:10.0.0.1]",
    "[::127.0.0.1]",
    "[64:ff9b::7f00:1]",
    "[64:ff9b::a00:1]",
    "[2002:7f00:1::]",
    "[fe80::1]",
    "[fec0::1]",
    "[fc00::1]",
    "[fd12:3456::1]",
    "[ff02::1]",
    "localhost",
    "LocalHost",
    "localhost.",
    "a.localhost",
]


@pytest.mark.parametrize("host", PRIVATE)
@pytest.mark.parametrize("form", ["http://{}/", "https://{}:8443/hook"])
def test_addresses_that_are_not_public_are_refused_in_every_spelling(host: str, form: str) -> None:
    url = form.format(host)
    with pytest.raises(receivers.WebhookRefused, match=r"not public|this machine"):
        receivers.check_url(url, allow_private=False)
    receivers.check_url(url, allow_private=True)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("", "scheme"),
        ("example.com/hook", "scheme"),
        ("ftp://example.com/", "scheme 'ftp'"),
        ("file:///etc/passwd", "scheme 'file'"),
        ("gopher://example.com/", "scheme"),
        ("https://user:word@example.com/", "user or password"),
        ("https://user@example.com/", "user or password"),
        ("https://@example.com/", "user or password"),
        ("https://example.com@127.0.0.1/", "user or password"),
        ("https:///hook", "host is ''"),
        ("https://:443/", "host is ''"),
        ("https://./", "host is ''"),
        ("https://a..b/", "host is"),
        ("https://exa%6dple.com/", "host is"),
        ("https://[fe80::1%25eth0]/", "host is|malformed"),
        ("https://[::1/", "malformed"),
        ("https://example.com:port/", "malformed"),
        ("https://example.com:65536/", "malformed"),
        ("https://example.com:0/", "port 0"),
        ("https://exam ple.com/", "a space"),
        ("https://example.com/\r\nx: y", "a space"),
        ("https://example.com\\@127.0.0.1/", "a backslash"),
        ("https://bücher.example/", "outside ASCII"),
        ("https://①②⑦.0.0.1/", "outside ASCII"),
        ("https://example.com/" + "a" * 2048, "2068 characters"),
    ],
)
@pytest.mark.parametrize("allow_private", [False, True])
def test_malformed_urls_are_refused(url: str, message: str, allow_private: bool) -> None:
    with pytest.raises(receivers.WebhookRefused, match=message) as caught:
        receivers.check_url(url, allow_private=allow_private)
    assert isinstance(caught.value, ValueError) and isinstance(caught.value, errors.DiffusionKDError)
    assert "word" not in str(caught.value).replace("password", "")
