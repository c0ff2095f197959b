package regbridge;

import demo.api.Greeter;
import java.util.ArrayList;
import java.util.HashMap;
import java.util.List;
import java.util.Map;
import org.apache.dubbo.config.ApplicationConfig;
import org.apache.dubbo.config.ProtocolConfig;
import org.apache.dubbo.config.RegistryConfig;
import org.apache.dubbo.config.ServiceConfig;
import org.apache.dubbo.config.bootstrap.DubboBootstrap;

/** Provides services and registers them in ZooKeeper. The system properties that say how are those read below. */
public final class DubboProvider {
    /** The service of providers with two=true; such a nested interface has a $ in its name. */
    public interface Stock {
        int count(String article);
    }

    public static final class GreeterService implements Greeter {
        @Override
        public String greet(String name) {
            return System.getProperty("id") + " greets " + name;
        }
    }

    public static final class StockService implements Stock {
        @Override
        public int count(String article) {
            return article.length();
        }
    }

    public static void main(String[] args) throws Exception {
        ApplicationConfig application = new ApplicationConfig(System.getProperty("app"));
        application.setMetadataType(System.getProperty("metadata"));
        application.setQosEnable(false); // would listen on all addresses

        RegistryConfig registry = new RegistryConfig(System.getProperty("registry"));
        registry.setTimeout(30_000); // of connecting, on a busy machine
        Map<String, String> parameters = new HashMap<>(Map.of("session", System.getProperty("session")));
        if (System.getProperty("mode").equals("service")) {
            parameters.put("registry-type", "service");
        }
        registry.setParameters(parameters);
        if (System.getProperty("user") != null) {
            registry.setUsername(System.getProperty("user"));
            registry.setPassword(System.getProperty("password"));
        }

        List<ProtocolConfig> protocols = new ArrayList<>();
        for (String protocol : System.getProperty("protocols").split(",")) { // name:port,...
            String[] parts = protocol.split(":");
            protocols.add(new ProtocolConfig(parts[0], Integer.parseInt(parts[1])));
        }

        ServiceConfig<Greeter> greeter = new ServiceConfig<>();
        greeter.setId("greeter"); // 2.7 takes two services without ids for one
        greeter.setInterface(Greeter.class);
        greeter.setRef(new GreeterService());
        greeter.setGroup(System.getProperty("group"));
        greeter.setVersion(System.getProperty("version"));
        greeter.setWeight(Integer.getInteger("weight"));

        DubboBootstrap provider = DubboBootstrap.getInstance();
        provider.application(application).registry(registry).protocols(protocols).service(greeter);
        if (Boolean.getBoolean("two")) {
            ServiceConfig<Stock> stock = new ServiceConfig<>();
            stock.setId("stock");
            stock.setInterface(Stock.class);
            stock.setRef(new StockService());
            stock.setVersion("2.0.0");
            provider.service(stock);
        }
        provider.start();
        System.out.println("READY");
        provider.await();
    }
}
