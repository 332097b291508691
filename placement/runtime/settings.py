"""What the service is started with unless it is told otherwise. Who only asks it need not import it for that."""

IDLE_SECONDS = 60.0
"""How long a node's actor stays where nothing is held: to Ray's autoscaler, which removes nodes that were idle for
minutes, a node with an actor is busy."""
