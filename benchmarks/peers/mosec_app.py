"""mosec with two workers: `python -m benchmarks.peers.mosec_app --port PORT`."""

from mosec import Server, Worker

from benchmarks.peers.segmenter import Segmenter


class Segmentation(Worker):
    resp_mime_type = "image/png"

    def __init__(self) -> None:
        super().__init__()
        self.segmenter = Segmenter()

    def deserialize(self, data: bytes) -> bytes:
        return data

    def forward(self, data: bytes) -> bytes:
        return self.segmenter(data)

    def serialize(self, data: bytes) -> bytes:
        return data


if __name__ == "__main__":
    server = Server()
    server.append_worker(Segmentation, num=2, route="/segment")
    server.run()
