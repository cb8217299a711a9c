"""A real RTSP server, GStreamer's, for tests: `rtsp_server.py`, run by the system's Python.

It serves a moving test picture as a camera does, H.264 and if asked for a tone, at /live on
loopback. It says `serving PORT` when it is ready, and runs until it is killed. With `--check` it
only says whether all parts are there.
"""

from __future__ import annotations

import argparse
from typing import Any

USER, PASSWORD = "watcher", "s3cret p@ss/word"
SOUNDS = {
    "aac": "voaacenc ! aacparse ! rtpmp4gpay",
    "opus": "opusenc ! rtpopuspay",
    "mulaw": "audioconvert ! audioresample ! audio/x-raw,rate=8000 ! mulawenc ! rtppcmupay",
}
ELEMENTS = (
    "videotestsrc", "x264enc", "rtph264pay", "filesrc", "qtdemux", "h264parse", "audiotestsrc",
    "voaacenc", "aacparse", "rtpmp4gpay", "audioconvert", "audioresample", "mulawenc",
    "rtppcmupay", "opusenc", "rtpopuspay", "rtpbin",
)  # fmt: skip


def load() -> tuple[Any, Any, Any]:
    """Gst, GstRtspServer and GLib.

    Raises:
        ImportError: when a part of them is missing, which is named.
    """
    try:
        import gi

        gi.require_version("Gst", "1.0")
        gi.require_version("GstRtspServer", "1.0")
        from gi.repository import GLib, Gst, GstRtspServer
    except ValueError as error:  # what gi raises where bindings are missing
        raise ImportError(str(error)) from error
    Gst.init(None)
    if missing := [name for name in ELEMENTS if Gst.ElementFactory.find(name) is None]:
        raise ImportError(f"GStreamer has no {', '.join(missing)}")
    return Gst, GstRtspServer, GLib


def description(arguments: argparse.Namespace) -> str:
    """The pipeline that makes the stream."""
    if arguments.clip:
        return (
            f'( filesrc location="{arguments.clip}" ! qtdemux ! h264parse ! '
            "rtph264pay name=pay0 pt=96 )"
        )
    width, height = arguments.size.split("x")
    source = "videotestsrc is-live=true pattern=ball"
    if arguments.frames:
        source += f" num-buffers={arguments.frames}"
    line = (
        f"{source} ! video/x-raw,format=I420,width={width},height={height},"
        f"framerate={arguments.rate}/1 ! x264enc tune=zerolatency speed-preset=ultrafast "
        f"threads=1 key-int-max={arguments.rate} ! rtph264pay name=pay0 pt=96"
    )
    if arguments.sound:
        line += (
            " audiotestsrc is-live=true samplesperbuffer=480 ! audio/x-raw,rate=48000,channels=1 "
            f"! {SOUNDS[arguments.sound]} name=pay1 pt={0 if arguments.sound == 'mulaw' else 97}"
        )
    return f"( {line} )"


def with_login(server: Any, rtsp: Any, gst: Any, factory: Any, method: str) -> None:
    """Has the server ask for a user and a password."""
    from gi.repository import GstRtsp

    auth = rtsp.RTSPAuth()
    token = rtsp.RTSPToken()
    token.set_string(rtsp.RTSP_TOKEN_MEDIA_FACTORY_ROLE, "user")
    if method == "digest":
        auth.set_supported_methods(GstRtsp.RTSPAuthMethod.DIGEST)
        auth.add_digest(USER, PASSWORD, token)
    else:
        auth.add_basic(rtsp.RTSPAuth.make_basic(USER, PASSWORD), token)
    server.set_auth(auth)
    role = gst.Structure.new_empty("user")
    role.set_value(rtsp.RTSP_PERM_MEDIA_FACTORY_ACCESS, True)
    role.set_value(rtsp.RTSP_PERM_MEDIA_FACTORY_CONSTRUCT, True)
    factory.add_role_from_structure(role)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", default="0")
    parser.add_argument(
        "--clip", help="an MP4 file with H.264 whose video is served from its start instead"
    )
    parser.add_argument("--rate", type=int, default=25)
    parser.add_argument("--frames", type=int, default=0, help="after which it ends; 0 for no end")
    parser.add_argument("--size", default="96x64")
    parser.add_argument("--sound", choices=SOUNDS)
    parser.add_argument("--login", choices=("basic", "digest"))
    parser.add_argument("--udp", action="store_true", help="take no RTP over TCP")
    parser.add_argument("--check", action="store_true", help="end, with 1 where a part is missing")
    arguments = parser.parse_args()
    gst, rtsp, glib = load()
    if arguments.check:
        return
    server = rtsp.RTSPServer()
    server.set_address("127.0.0.1")
    server.set_service(arguments.port)
    factory = rtsp.RTSPMediaFactory()
    factory.set_launch(description(arguments))
    if arguments.udp:
        from gi.repository import GstRtsp

        factory.set_protocols(GstRtsp.RTSPLowerTrans.UDP)
    if arguments.login:
        with_login(server, rtsp, gst, factory, arguments.login)
    server.get_mount_points().add_factory("/live", factory)
    if not server.attach(None):
        raise SystemExit(f"port {arguments.port} cannot be served")
    print(f"serving {server.get_bound_port()}", flush=True)
    glib.MainLoop().run()


if __name__ == "__main__":
    main()
