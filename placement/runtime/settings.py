"""What the service is started with unless it is told otherwise. Who only asks it need not import it for that."""

IDLE_SECONDS = 60.0
"""How long a node's actor stays where nothing is held: to Ray's autoscaler, which removes nodes that were idle for
minutes, a node with an actor is busy."""

HISTORY_DAYS, HISTORY_MIB = 30.0, 8.0
"""How long events and decisions are kept, and how much of Ray's store they may take."""
