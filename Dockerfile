# A machine on which `make demo` runs:
#
#   docker build -t shardwise .
#   docker run --rm shardwise                                          # on the CPU
#   docker run --rm --gpus all --ipc=host --ulimit memlock=-1 shardwise  # memlock: what is offloaded is pinned
#
# It is no part of the tests: they run where there is no docker.
FROM python:3.11-slim

RUN apt-get update \
    && apt-get install --yes --no-install-recommends make \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /shardwise
COPY . .
RUN make setup

CMD ["make", "demo"]
